"""Conversion of GGUF files and Hugging Face folders to Hugging Face folders."""

import shutil
from pathlib import Path

from model.convert.gguf_file import load_gguf
from model.convert.huggingface import load_hf, save_hf
from model.convert.tensors import INDEX
from model.dtypes import DTypeLike
from model.gguf_parts import find_gguf

# Files that are copied: the tokenizer's, and the pooling of sentence encoders.
_COPIED = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)


def convert(
    source: str | Path, target: str | Path, *, dtype: DTypeLike = "float32", model_type: str | None = None
) -> None:
    """Write a GGUF file or a Hugging Face folder as a Hugging Face folder in `dtype`, float32 or bfloat16.

    Tokenizer files of a folder are copied; the tokenizer of a GGUF file is not converted. model_type: see `save_hf`.
    Raises InputError like `load_hf`, `load_gguf` and `save_hf`.
    """
    source, target = Path(source), Path(target)
    if source.is_dir() and not (source / "config.json").is_file():
        source = find_gguf(source) or source
    load = load_gguf if source.suffix == ".gguf" else load_hf
    config, params = load(source, dtype=dtype)
    save_hf(config, params, target, model_type=model_type)
    if source.is_dir() and source.resolve() != target.resolve():
        for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
            if file.is_file() and file.name != INDEX:
                shutil.copy2(file, target / file.name)
