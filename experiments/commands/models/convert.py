"""`isoflop model convert`: other people's weights as a Hugging Face folder."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

import tyro


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    model_type: str | None = None,
) -> None:
    """Write a run, a GGUF file or a Hugging Face folder as a Hugging Face folder that Transformers loads.

    Its tokenizer goes along.

    Example: isoflop model convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2

    Args:
        source: A run directory, a .gguf file, or a folder with config.json and safetensors.
        target: The folder to make; it appears when it is complete. A model written by isoflop before is replaced.
        dtype: Precision of the weights that are written.
        model_type: The family to write as, such as llama or gpt2, where the config fits several.
    """
    import jax

    from experiments.models import copy_tokenizer
    from model import accounting
    from model.convert import convert as write
    from model.convert import load_hf, save_hf
    from model.errors import InputError
    from model.quantized import RECORD
    from model.store import open_parameters, open_tokenizer

    if (source / RECORD).is_file():
        raise InputError(f"{source} holds rounded weights; give the model that it was made of")
    if (source / "run.json").is_file():
        config, params = open_parameters(source)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        save_hf(config, params, target, model_type=model_type)
    elif source.exists():
        write(source, target, dtype=dtype, model_type=model_type)
        config = load_hf(target)[0]
    else:
        raise InputError(f"there is no model at {source}; give a run directory, a .gguf file or a Hugging Face folder")
    with suppress(InputError):  # weights are worth having where the tokenizer cannot be read
        if (tokenizer := open_tokenizer(source)) is not None:
            copy_tokenizer(tokenizer, target)
    print(f"{target}: {accounting.parameters(config).total:,} parameters")
