"""Text to token ids and back. Training a tokenizer is `train.data.tokenizer_training`'s."""

from model.tokenizer.base import Tokenizer
from model.tokenizer.load import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
