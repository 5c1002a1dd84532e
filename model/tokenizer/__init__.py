"""Tokenizers: text to token ids and back. Training one is in `train.data.tokenizer_training`."""

from model.tokenizer.base import Tokenizer
from model.tokenizer.load import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
