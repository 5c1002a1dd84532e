"""Train a sentencepiece BPE tokenizer whose decoding reproduces every text exactly."""

import hashlib
import heapq
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from model.errors import InputError
from train.files import write_atomically

SPECIAL_PIECES = ("<|pad|>", "<|unknown|>", "<|endoftext|>")  # ids 0, 1, 2
# Every byte, and one learned piece, without which sentencepiece does not train.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_PIECES) + 1
_PASSAGE = 4096  # characters
# sentencepiece's trainer skips texts with a tab, NUL or U+2585, and reads U+2581 as a space. Texts are split at these
# characters and at line ends, so that nothing is skipped; they are encoded as bytes, a newline as one token.
_SEPARATORS = "\0\t\n\r\u2581\u2585"
_COVERAGE = 0.9995
_HASH_KEY = bytes(16)


class TextSample:
    """Sample of at most `limit` bytes: the passages with the smallest hashes.

    It does not depend on the order of the texts and needs one pass and bounded memory.
    """

    def __init__(self, limit: int = 32 * 2**20):
        self._limit, self._size = limit, 0
        self._heap: list[tuple[int, bytes]] = []
        self._bound = 2**64

    def add(self, text: str) -> None:
        """Add those passages of a text whose hashes are small enough, and drop others beyond the limit."""
        for start in range(0, len(text), _PASSAGE):
            passage = text[start : start + _PASSAGE].encode("utf-8", "replace")
            rank = int.from_bytes(hashlib.blake2b(passage, digest_size=8, key=_HASH_KEY).digest())
            if rank >= self._bound:
                continue
            heapq.heappush(self._heap, (-rank, passage))
            self._size += len(passage)
            while self._size > self._limit and len(self._heap) > 1:
                largest, dropped = heapq.heappop(self._heap)
                self._size -= len(dropped)
                self._bound = -largest  # so that the sample does not depend on the order of the texts

    def __iter__(self) -> Iterator[str]:
        return (passage.decode() for _, passage in sorted(self._heap, reverse=True))


def train_tokenizer(texts: Iterable[str], out: str | Path, *, vocab_size: int) -> Path:
    """Train on a sample of the texts, write a `.model` file and return its path.

    BPE with byte fallback, single digits, no normalisation and no dummy prefix, so that decoding reproduces the text.
    `out` is the file, or a folder for `tokenizer.model`. Ids: 0 padding, 1 unknown (never produced), 2 end of text.
    Raises InputError if the texts are too few for the vocabulary.
    """
    check_vocab_size(vocab_size)
    out = Path(out)
    if out.is_dir():
        out = out / "tokenizer.model"
    elif out.suffix != ".model":
        out = out.with_name(out.name + ".model")
    sample = texts
    if not isinstance(texts, TextSample):
        sample = TextSample()
        for text in texts:
            sample.add(text)
    write_atomically(out, _train_model(list(sample), vocab_size))
    return out


def check_vocab_size(vocab_size: int) -> None:
    """Raise `InputError` for a vocabulary that cannot hold all bytes and the special tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size={vocab_size} is too small: 256 bytes, {len(SPECIAL_PIECES)} special tokens and one"
            f" learned piece need at least {MIN_VOCAB_SIZE}"
        )


def _character_counts(passages: list[str]) -> list[tuple[str, int]]:
    """Return (character, count) of the characters that may become pieces, the most frequent first."""
    counts: Counter[str] = Counter()
    for passage in passages:
        counts.update(passage)
    for separator in _SEPARATORS:
        del counts[separator]
    if not counts:
        raise InputError("the texts to train the tokenizer on have nothing but line ends; give more text")
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _common_characters(counts: list[tuple[str, int]], most: int) -> set[str]:
    """Return the most frequent characters that cover `_COVERAGE` of the text, at most `most`."""
    enough, total, kept = _COVERAGE * sum(count for _, count in counts), 0, set()
    for character, count in islice(counts, most):
        if total >= enough:
            break
        kept.add(character)
        total += count
    return kept


def _split_at_rare(passages: list[str], kept: set[str], counts: list[tuple[str, int]]) -> list[str]:
    """Split the passages at separators and at all characters but the kept ones."""
    rare = dict.fromkeys((ord(character) for character, _ in counts if character not in kept), "\n")
    separators = re.compile(f"[{_SEPARATORS}]+")
    translated = (passage.translate(rare) for passage in passages) if rare else passages
    return [text for passage in translated for text in separators.split(passage) if text]


def _train_model(passages: list[str], vocab_size: int) -> bytes:
    counts = _character_counts(passages)
    room = vocab_size - MIN_VOCAB_SIZE + 1
    # Rare characters are left to the byte fallback, so that they do not fill a small vocabulary …
    kept = _common_characters(counts, max(1, room // 2))
    try:
        return _train(_split_at_rare(passages, kept, counts), vocab_size)
    except _TooFewPieces:
        # … unless the text has too few merges to fill the vocabulary without them.
        kept = {character for character, _ in counts[:room]}
    try:
        return _train(_split_at_rare(passages, kept, counts), vocab_size)
    except _TooFewPieces as error:
        raise InputError(
            f"the corpus is too small for vocab_size={vocab_size}: the largest that works is {error};"
            " take that or a larger corpus"
        ) from None


class _TooFewPieces(Exception):
    """The texts give fewer pieces than requested; the argument is their number."""


def _train(texts: list[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            byte_fallback=True,
            character_coverage=1.0,  # rare characters are removed already
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _PASSAGE + 1,  # in bytes: nothing is skipped
            pad_id=0,
            unk_id=1,
            eos_id=2,
            bos_id=-1,
            pad_piece=SPECIAL_PIECES[0],
            unk_piece=SPECIAL_PIECES[1],
            eos_piece=SPECIAL_PIECES[2],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        if largest is None:
            raise
        raise _TooFewPieces(largest[1]) from error
    return model.getvalue()
