"""Other people's weights: Hugging Face folders in and out, GGUF files in."""

from model.convert.convert import convert
from model.convert.fold import fold
from model.convert.gguf_file import load_gguf
from model.convert.huggingface import load_hf, save_hf

__all__ = ["load_hf", "save_hf", "load_gguf", "convert", "fold"]
