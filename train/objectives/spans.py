"""Span corruption (T5, Raffel et al. 2020, section 3.1.4): an encoder reads text with gaps, a decoder fills them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from model import Execution, InputError, ModelConfig
from model.checks import check_number
from train.config import HParams, TrainConfig
from train.data.manifest import Manifest
from train.data.noise import Noise
from train.data.shards import TokenShards
from train.objectives.objective import Batch, BatchSpec, seq_lens, special_ids
from train.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True)
class SpanCorruption(TokenObjective):
    """Replace spans of a row by sentinels; the targets are each sentinel with what it replaced, then the end token.

    rate: share of a row's tokens in spans; mean_span: their mean length in tokens. Both fix shapes, so they are no
    hyperparameters. sentinels: how many ids are kept for them; first_sentinel: the id of the first one, the others
    follow downwards, as in T5's vocabularies; None: the last id of the model's vocabulary. The row's `seq_len` counts
    the text's tokens; the encoder reads fewer and the decoder predicts the rest (`lengths`). With documents told apart
    every document is an example of its own: spans end where it does, and its sentinels start with the first.
    """

    NAME: ClassVar[str] = "spans"
    POSITIVE = ("rate", "mean_span", "sentinels")

    rate: float = 0.15
    mean_span: float = 3.0
    sentinels: int = 100
    first_sentinel: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rate", self.rate, below=1, hint="with 1 the encoder would see nothing")
        check_number("mean_span", self.mean_span, least=1)

    def fit(self, config: ModelConfig, manifest: Manifest | None = None) -> tuple[ModelConfig, Self]:
        """Return the model with ids for the sentinels, unless first_sentinel is given."""
        del manifest
        if self.first_sentinel is not None:
            return config, self
        config = config.replace(vocab_size=config.vocab_size + self.sentinels)
        return config, self.resolved(config)

    def resolved(self, config: ModelConfig) -> Self:
        """Return the objective with the first sentinel's id named."""
        return self.replace(first_sentinel=self._first(config))

    def special_tokens(self, config: ModelConfig) -> dict[int, str]:
        """Return the sentinels, by T5's names."""
        return {self._first(config) - number: f"<extra_id_{number}>" for number in range(self.sentinels)}

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError on a model without two stacks, or on rows that need more sentinels than there are."""
        if config.stack != "encoder-decoder" or config.head != "language-model":
            raise InputError(
                f"objective='spans' trains encoder-decoders with a language-model head, not stack={config.stack!r} "
                f"with head={config.head!r}; take a t5 preset, or set stack=encoder-decoder"
            )
        first = self._first(config)
        if not self.sentinels <= first + 1 <= config.vocab_size:
            raise InputError(
                f"first_sentinel={first} with {self.sentinels} sentinels below it lies outside the vocabulary of "
                f"{config.vocab_size}"
            )
        for seq_len in seq_lens(train_config):
            if seq_len < 2:
                raise InputError(f"seq_len={seq_len} leaves no token beside a span; take rows of at least 2")
            if (spans := self.counts(seq_len)[1]) > self.sentinels:
                raise InputError(f"rows of {seq_len} tokens have {spans} spans; set objective.sentinels={spans}")
            longest = max(self.lengths(seq_len, packed=True))
            if longest > config.max_seq_len:
                raise InputError(
                    f"seq_len={seq_len} gives rows of {longest} tokens, longer than the model's context, "
                    f"max_seq_len={config.max_seq_len}"
                )

    def check_execution(self, train_config: TrainConfig, execution: Execution) -> None:
        """Raise InputError unless the execution divides every batch, and every row that the decoder predicts."""
        train_config.check(execution.replace(loss_chunks=1))
        for seq_len in seq_lens(train_config):
            target = self.lengths(seq_len, packed=train_config.tells_documents_apart)[1]
            if target % execution.loss_chunks:
                raise InputError(
                    f"loss_chunks={execution.loss_chunks} does not divide the {target} tokens that the decoder "
                    f"predicts of a row of seq_len={seq_len}; take a divisor of {target}"
                )

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError where a sentinel's id is a piece of the data's text."""
        super().check_data(config, sources)
        first = self._first(config)
        for source in sources.values():
            ids = list(range(first - self.sentinels + 1, first + 1))
            special_ids(source.manifest, ids, source.folder, "the sentinels")

    def counts(self, seq_len: int) -> tuple[int, int]:
        """Return (tokens in spans, spans) of a row."""
        noise = min(max(round(seq_len * self.rate), 1), seq_len - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, seq_len - noise)

    def lengths(self, seq_len: int, *, packed: bool = False) -> tuple[int, int]:
        """Return the tokens of a row that the encoder reads and those that the decoder predicts.

        packed: of rows with documents or padding, room for the worst case.
        """
        noise, spans = self.counts(seq_len)
        return (seq_len, noise + 2 * spans) if packed else (seq_len - noise + spans, noise + spans + 1)

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the decoder's tokens and targets with their mask, and the encoder's tokens."""
        del config
        packed = evaluation or train_config.tells_documents_apart
        source, target = self.lengths(seq_len, packed=packed)
        shapes: dict[str, tuple[int, Any]] = {
            "encoder_tokens": (source, np.int32),
            "tokens": (target, np.int32),
            "targets": (target, np.int32),
            "loss_mask": (target, np.float32),
        }
        if packed:
            shapes |= {"encoder_segment_ids": (source, np.int32), "segment_ids": (target, np.int32)}
        return {name: jax.ShapeDtypeStruct((batch_size, size), dtype) for name, (size, dtype) in shapes.items()}

    def corrupt(
        self, config: ModelConfig, batch: Batch, noise: Noise, manifest: Manifest, hparams: HParams | None
    ) -> Batch:
        """Return what the encoder reads and the decoder is to write of rows of text."""
        tokens = batch["tokens"]
        seq_len = tokens.shape[1]
        packed = hparams is None or "segment_ids" in batch
        documents = np.ones_like(tokens)
        if "segment_ids" in batch:
            documents = batch["segment_ids"]
        elif "loss_mask" in batch:
            documents = (batch["loss_mask"] > 0).astype(np.int32)
        starts, inside = _spans(noise.uniform(0), noise.uniform(1), *self.counts(seq_len))
        inside, starts = _within_documents(inside, starts, documents)
        first_of_document = documents != np.pad(documents, ((0, 0), (1, 0)))[:, :-1]
        number = _count_within(starts, first_of_document)  # of a span in its document, from 1
        sentinels = self._first(config) - (number - 1)

        source, target = self.lengths(seq_len, packed=packed)
        keep = (~inside | starts) & (documents > 0)
        made: Batch = {"encoder_tokens": _compress(np.where(starts, sentinels, tokens), keep, source)}
        # In the targets a span's first token follows its sentinel, and a document's last one is followed by the end.
        last = _last_of_document(inside, documents)
        order = np.stack([starts, inside, last], axis=2).reshape(len(tokens), -1)
        ends = np.full_like(tokens, manifest.eos_id)
        values = np.stack([sentinels, tokens, ends], axis=2).reshape(len(tokens), -1)
        of_document = np.repeat(documents, 3, axis=1)
        targets, segments = _compress(values, order, target), _compress(of_document, order, target)
        begins = segments != np.pad(segments, ((0, 0), (1, 0)))[:, :-1]
        shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        shown = np.where(begins, np.int32(config.decoder_start_token_id), shifted)
        real = segments > 0
        made |= {"tokens": np.where(real, shown, 0), "targets": targets, "loss_mask": real.astype(np.float32)}
        if packed:
            made |= {"encoder_segment_ids": _compress(documents, keep, source), "segment_ids": segments}
        return made

    def lengths_of_row(self, seq_len: int) -> tuple[int, int]:
        """Return the tokens of the decoder's and of the encoder's row, without padding."""
        source, target = self.lengths(seq_len)
        return target, source

    def _first(self, config: ModelConfig) -> int:
        return config.vocab_size - 1 if self.first_sentinel is None else self.first_sentinel


def _spans(
    lengths: Float64[np.ndarray, "rows seq"], gaps: Float64[np.ndarray, "rows seq"], noise: int, spans: int
) -> tuple[Bool[np.ndarray, "rows seq"], Bool[np.ndarray, "rows seq"]]:
    """Return (where a span starts, what lies in spans): `spans` of them with `noise` tokens in all, text before each.

    lengths, gaps: random numbers that decide how the spans' tokens and those between them are divided.
    """
    rows, seq_len = lengths.shape
    inner = _parts(lengths[:, : noise - 1], noise, spans)
    outer = _parts(gaps[:, : seq_len - noise - 1], seq_len - noise, spans)
    begin = np.cumsum(outer, axis=1) + np.cumsum(inner, axis=1) - inner
    marks = np.zeros((rows, seq_len + 1), np.int64)
    row = np.arange(rows)[:, None]
    marks[row, begin] += 1
    starts = marks[:, :-1] > 0
    np.add.at(marks, (row, begin + inner), -1)
    return starts, np.cumsum(marks, axis=1)[:, :-1] > 0


def _parts(draws: Float64[np.ndarray, "rows cuts"], total: int, parts: int) -> Int64[np.ndarray, "rows parts"]:
    """Divide `total` into positive whole parts, every division equally likely: cuts at the smallest draws."""
    cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    rows = len(draws)
    edges = [np.zeros((rows, 1), np.int64), cuts.astype(np.int64), np.full((rows, 1), total, np.int64)]
    return np.diff(np.concatenate(edges, axis=1), axis=1)


def _within_documents(
    inside: Bool[np.ndarray, "rows seq"], starts: Bool[np.ndarray, "rows seq"], documents: Int[np.ndarray, "rows seq"]
) -> tuple[Bool[np.ndarray, "rows seq"], Bool[np.ndarray, "rows seq"]]:
    """Return the spans cut off where the document ends in which they start, without those in padding."""
    place = np.arange(inside.shape[1])
    begin = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    inside = inside & (documents == np.take_along_axis(documents, begin, axis=1)) & (documents > 0)
    return inside, starts & inside


def _count_within(
    marks: Bool[np.ndarray, "rows seq"], first: Bool[np.ndarray, "rows seq"]
) -> Int[np.ndarray, "rows seq"]:
    """Return how many marks there were up to each place since the last `first`, int32."""
    so_far = np.cumsum(marks, axis=1, dtype=np.int32)
    before = so_far - marks
    return so_far - np.maximum.accumulate(np.where(first, before, 0), axis=1)


def _last_of_document(
    inside: Bool[np.ndarray, "rows seq"], documents: Int[np.ndarray, "rows seq"]
) -> Bool[np.ndarray, "rows seq"]:
    """Return where a document's last token in a span stands."""
    last_document = documents != np.pad(documents, ((0, 0), (0, 1)))[:, 1:]
    from_behind = _count_within(inside[:, ::-1], last_document[:, ::-1])[:, ::-1]
    return inside & (from_behind == 1)


def _compress(values: np.ndarray, keep: Bool[np.ndarray, "rows n"], length: int) -> Int[np.ndarray, "rows length"]:
    """Return the kept values of every row without gaps, int32, padded with 0."""
    row, _ = np.nonzero(keep)
    place = (np.cumsum(keep, axis=1) - 1)[keep]
    made = np.zeros((len(values), length), np.int32)
    made[row, place] = values[keep]
    return made
