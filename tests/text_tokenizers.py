"""Small tokenizers of every kind that matters for text: how they mark spaces, and what they do with bytes."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model.tokenizer.sentencepiece_proto import model_proto

WORDS = [*"▁etaonisrhlducmfpgwyb.,\n", "▁t", "he", "▁the", "▁of", "▁people", "▁time", "▁day", "in", "on", "▁▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<|end|>", "<|user|>"]
TEXTS = [
    "the people",
    " time  of day.\n\n",
    "é",
    "naïve – “quotes”",
    "日本語",
    "👩‍👩‍👧 ok",
    "a\tb",
    "  ",
    "of\nthe time",
    "ạ̊",
]


def sentencepiece(folder):
    """As Llama 2's: a prefix space, byte fallback, control tokens."""
    pieces = [("<unk>", 0.0, 2), *((name, 0.0, 3) for name in ("<s>", "</s>", *SPECIAL))]
    pieces += [(name, 0.0, 6) for name in BYTES] + [(word, -float(i), 1) for i, word in enumerate(WORDS)]
    options = {"unigram": False, "byte_fallback": True, "add_dummy_prefix": True, "remove_extra_whitespaces": False}
    (folder / "tokenizer.model").write_bytes(model_proto(pieces, **options))


def extra_whitespaces(folder):
    """As T5's: all spaces before the first word are dropped."""
    pieces = [("<unk>", 0.0, 2), *((name, 0.0, 3) for name in ("<s>", "</s>", *SPECIAL))]
    pieces += [(word, -1 - i / 10, 1) for i, word in enumerate(WORDS)]
    options = {"unigram": True, "byte_fallback": False, "add_dummy_prefix": True, "remove_extra_whitespaces": True}
    (folder / "tokenizer.model").write_bytes(model_proto(pieces, **options))


def byte_level(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    save(library, folder)


def byte_fallback(folder):
    """As Llama 2's tokenizer.json: a run of bytes of which one does not fit is no text at all."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", *BYTES, *dict.fromkeys(WORDS)])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    save(library, folder)


def wordpiece(folder):
    letters = [*"abcdefghijklmnopqrstuvwxyz.,", "the", "people", "time", "day"]
    vocabulary = {token: i for i, token in enumerate(["[UNK]", *letters, *(f"##{part}" for part in letters)])}
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    save(library, folder)


def save(library, folder):
    library.add_special_tokens(SPECIAL)
    library.save(str(folder / "tokenizer.json"))
