"""From any format that is read to a Hugging Face folder."""

import shutil
from pathlib import Path

from model.convert.gguf_file import load_gguf
from model.convert.huggingface import load_hf, save_hf
from model.convert.tensors import INDEX
from model.dtypes import DTypeLike
from model.gguf_parts import find_gguf

# What a folder needs besides the model to be used: its tokenizer, and how sentences are pooled.
_BESIDES = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)


def convert(
    source: str | Path, target: str | Path, *, dtype: DTypeLike = "float32", model_type: str | None = None
) -> None:
    """Write a GGUF file or a Hugging Face folder as a Hugging Face folder in `dtype`, float32 or bfloat16.

    The tokenizer's files of a folder are copied too; a GGUF file's tokenizer is not converted. model_type: as in
    `save_hf`. Raises what `load_hf`, `load_gguf` and `save_hf` raise.
    """
    source, target = Path(source), Path(target)
    if source.is_dir() and not (source / "config.json").is_file():
        source = find_gguf(source) or source
    load = load_gguf if source.suffix == ".gguf" else load_hf
    config, params = load(source, dtype=dtype)
    save_hf(config, params, target, model_type=model_type)
    if source.is_dir() and source.resolve() != target.resolve():
        for file in sorted({file for pattern in _BESIDES for file in source.glob(pattern)}):
            if file.is_file() and file.name != INDEX:
                shutil.copy2(file, target / file.name)
