"""Conversion of weights: read and write Hugging Face folders and PEFT adapters, read GGUF files."""

from model.convert.convert import convert
from model.convert.fold import fold
from model.convert.gguf_file import load_gguf
from model.convert.huggingface import load_hf, save_hf
from model.convert.peft import load_peft, merge_adapter, save_peft

__all__ = ["load_hf", "save_hf", "load_gguf", "convert", "fold", "save_peft", "load_peft", "merge_adapter"]
