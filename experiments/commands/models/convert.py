"""`isoflop model convert`: other people's weights as a Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Literal

import tyro

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    model_type: str | None = None,
) -> None:
    """Write a run, a GGUF file or a Hugging Face folder as a Hugging Face folder that Transformers loads.

    The tokenizer's files go along; a GGUF file has none, so give that file as --tokenizer later.

    Example: isoflop model convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2

    Args:
        source: A run directory, a .gguf file, or a folder with config.json and safetensors.
        target: The folder to make; it appears when it is complete.
        dtype: Precision of the weights that are written.
        model_type: The family to write as, such as llama or gpt2, where the config fits several.
    """
    import jax

    from model import accounting
    from model.convert import convert as write
    from model.convert import load_hf, save_hf
    from model.errors import InputError

    if (source / "run.json").is_file():
        from train import load_run

        config, params = load_run(source)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        save_hf(config, params, target, model_type=model_type)
    elif source.exists():
        write(source, target, dtype=dtype, model_type=model_type)
        config = load_hf(target)[0]
    else:
        raise InputError(f"there is no model at {source}; give a run directory, a .gguf file or a Hugging Face folder")
    _copy_tokenizer(source, target)
    print(f"{target}: {accounting.parameters(config).total:,} parameters")


def _copy_tokenizer(source: Path, target: Path) -> None:
    from train.run import read_record

    if (source / "run.json").is_file():  # the tokenizer of a run stands with its data
        source = Path(read_record(source).get("data") or source)
    for name in _TOKENIZER:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
