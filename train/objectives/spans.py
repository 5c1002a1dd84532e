"""Span corruption (T5, Raffel et al. 2020, section 3.1.4): an encoder reads text with gaps, a decoder fills them in."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from model import Execution, InputError, ModelConfig
from model.errors import check_number
from train.config import HParams, TrainConfig
from train.data.manifest import Manifest
from train.data.noise import Noise
from train.data.shards import TokenShards
from train.objectives.objective import Batch, BatchSpec, seq_lens, special_ids
from train.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True)
class SpanCorruption(TokenObjective):
    """Replacement of spans of text by sentinels, which the decoder predicts with the tokens that they replace.

    The text a b c d e f with the spans b c and e gives the encoder a S0 d S1 f and the targets S0 b c S1 e END.

    rate: fraction of a row's tokens in spans; mean_span: mean tokens per span. Both determine shapes, so they are not
    hyperparameters. sentinels: ids reserved for sentinels; first_sentinel: id of S0, with S1, … at the ids below, as in
    T5's vocabularies; None: the last id of the model's vocabulary. `seq_len` counts the tokens of text in a row, of
    which the encoder and the decoder each see a part (`lengths`). If documents are separate, each is an example of its
    own: spans end with the document, and sentinels are numbered from S0 again.
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
        """Return the model with additional ids for the sentinels, unless first_sentinel is set."""
        del manifest
        if self.first_sentinel is not None:
            return config, self
        config = config.replace(vocab_size=config.vocab_size + self.sentinels)
        return config, self.resolved(config)

    def resolved(self, config: ModelConfig) -> Self:
        """Return the objective with first_sentinel set."""
        return self.replace(first_sentinel=self._first_sentinel(config))

    def special_tokens(self, config: ModelConfig) -> dict[int, str]:
        """Return the sentinels' ids with T5's names for them."""
        return {self._first_sentinel(config) - number: f"<extra_id_{number}>" for number in range(self.sentinels)}

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError unless the model is an encoder-decoder whose context and sentinels suffice for the rows."""
        if config.stack != "encoder-decoder" or config.head != "language-model":
            raise InputError(
                f"objective='spans' trains encoder-decoders with a language-model head, not stack={config.stack!r} "
                f"with head={config.head!r}; take a t5 preset, or set stack=encoder-decoder"
            )
        first = self._first_sentinel(config)
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
        """Raise InputError unless microbatches divide every batch, and loss_chunks every row of the decoder."""
        train_config.check(execution.replace(loss_chunks=1))
        for seq_len in seq_lens(train_config):
            target = self.lengths(seq_len, packed=train_config.tells_documents_apart)[1]
            if target % execution.loss_chunks:
                raise InputError(
                    f"loss_chunks={execution.loss_chunks} does not divide the {target} tokens that the decoder "
                    f"predicts of a row of seq_len={seq_len}; take a divisor of {target}"
                )

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError if a sentinel's id is also the id of a text token."""
        super().check_data(config, sources)
        first = self._first_sentinel(config)
        for source in sources.values():
            ids = list(range(first - self.sentinels + 1, first + 1))
            special_ids(source.manifest, ids, source.folder, "the sentinels")

    def counts(self, seq_len: int) -> tuple[int, int]:
        """Return (tokens in spans, spans) of a row; rows of 512 have 77 tokens in 26 spans at the defaults."""
        noise_tokens = min(max(round(seq_len * self.rate), 1), seq_len - 1)
        spans = max(round(noise_tokens / self.mean_span), 1)
        return noise_tokens, min(spans, noise_tokens, seq_len - noise_tokens)

    def lengths(self, seq_len: int, *, packed: bool = False) -> tuple[int, int]:
        """Return the row lengths (encoder, decoder) for rows of `seq_len` tokens of text.

        packed: of rows with separate documents or padding, in the worst case: no span for the encoder, or an end token
        after each span for the decoder.
        """
        noise_tokens, spans = self.counts(seq_len)
        if packed:
            return seq_len, noise_tokens + 2 * spans
        return seq_len - noise_tokens + spans, noise_tokens + spans + 1

    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the decoder's tokens, targets and loss mask, and the encoder's tokens."""
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
        """Return the encoder's tokens, and the decoder's tokens, targets and loss mask, for rows of text.

        The text a b c d e f with the spans b c and e gives encoder_tokens a S0 d S1 f, targets S0 b c S1 e END and
        tokens START S0 b c S1 e.
        """
        tokens = batch["tokens"]
        rows, seq_len = tokens.shape
        packed = hparams is None or "segment_ids" in batch
        documents = _document_ids(batch)
        starts, inside = _random_spans(noise.uniform(0), noise.uniform(1), *self.counts(seq_len))
        inside, starts = _clip_to_documents(inside, starts, documents)
        first_of_document = documents != _shift_right(documents)
        span_number = _count_since(first_of_document, starts)  # of the latest span in the document, from 1
        sentinels = self._first_sentinel(config) - (span_number - 1)
        source, target = self.lengths(seq_len, packed=packed)

        # The encoder reads the text outside spans, and a sentinel in place of each span's first token.
        read = (~inside | starts) & (documents > 0)
        result: Batch = {"encoder_tokens": _gather_left(np.where(starts, sentinels, tokens), read, source)}
        if packed:
            result["encoder_segment_ids"] = _gather_left(documents, read, source)

        # Each position of the text has up to three targets: a sentinel if a span starts there, its token if it is in a
        # span, and the end token if it is the document's last one in a span.
        is_last = _last_in_document(inside, documents)
        ends = np.full_like(tokens, manifest.eos_id)
        candidates = np.stack([sentinels, tokens, ends], axis=2).reshape(rows, 3 * seq_len)
        predicted = np.stack([starts, inside, is_last], axis=2).reshape(rows, 3 * seq_len)
        targets = _gather_left(candidates, predicted, target)
        segments = _gather_left(np.repeat(documents, 3, axis=1), predicted, target)

        # Teacher forcing: the decoder reads the targets shifted by one, and the start token where a document begins.
        first_of_segment = segments != _shift_right(segments)
        inputs = np.where(first_of_segment, np.int32(config.decoder_start_token_id), _shift_right(targets))
        real = segments > 0
        result |= {"tokens": np.where(real, inputs, 0), "targets": targets, "loss_mask": real.astype(np.float32)}
        if packed:
            result["segment_ids"] = segments
        return result

    def lengths_of_row(self, seq_len: int) -> tuple[int, int]:
        """Return the row lengths (decoder, encoder), without padding."""
        source, target = self.lengths(seq_len)
        return target, source

    def _first_sentinel(self, config: ModelConfig) -> int:
        return config.vocab_size - 1 if self.first_sentinel is None else self.first_sentinel


def _document_ids(batch: Batch) -> Int[np.ndarray, "rows seq"]:
    """Return the document of each position: 1, 2, … within the row, 0 for padding."""
    if "segment_ids" in batch:
        return batch["segment_ids"]
    if "loss_mask" in batch:
        return (batch["loss_mask"] > 0).astype(np.int32)
    return np.ones_like(batch["tokens"])


def _random_spans(
    length_draws: Float64[np.ndarray, "rows seq"],
    gap_draws: Float64[np.ndarray, "rows seq"],
    noise_tokens: int,
    spans: int,
) -> tuple[Bool[np.ndarray, "rows seq"], Bool[np.ndarray, "rows seq"]]:
    """Return (first tokens of spans, tokens in spans) for random spans, each with text before it.

    The draws in [0, 1) determine the lengths of the spans and of the gaps before them. Gaps of 2 and 1 tokens and spans
    of 1 and 2 give the row: text, text, span 1, text, span 2, span 2.
    """
    rows, seq_len = length_draws.shape
    text_tokens = seq_len - noise_tokens
    lengths = _random_composition(length_draws[:, : noise_tokens - 1], noise_tokens, spans)
    gaps = _random_composition(gap_draws[:, : text_tokens - 1], text_tokens, spans)
    ends = np.cumsum(gaps, axis=1) + np.cumsum(lengths, axis=1)
    begins = ends - lengths
    row = np.arange(rows)[:, None]
    edges = np.zeros((rows, seq_len + 1), np.int64)  # 1 where a span begins, -1 after its last token
    edges[row, begins] = 1
    edges[row, ends] = -1
    starts = edges[:, :-1] == 1
    inside = np.cumsum(edges, axis=1)[:, :-1] == 1
    return starts, inside


def _random_composition(
    draws: Float64[np.ndarray, "rows boundaries"], total: int, parts: int
) -> Int64[np.ndarray, "rows parts"]:
    """Divide `total` into positive integers, all compositions equally likely.

    The `total` - 1 draws belong to the boundaries between units; the smallest ones divide. For total=6 and parts=3, the
    draws .9 .1 .5 .2 .7 divide after units 2 and 4: the parts are 2, 2 and 2.
    """
    boundaries = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    rows = len(draws)
    edges = [np.zeros((rows, 1), np.int64), boundaries.astype(np.int64), np.full((rows, 1), total, np.int64)]
    return np.diff(np.concatenate(edges, axis=1), axis=1)


def _clip_to_documents(
    inside: Bool[np.ndarray, "rows seq"], starts: Bool[np.ndarray, "rows seq"], documents: Int[np.ndarray, "rows seq"]
) -> tuple[Bool[np.ndarray, "rows seq"], Bool[np.ndarray, "rows seq"]]:
    """Return (inside, starts) of spans that end with the document in which they start; spans in padding are dropped."""
    column = np.arange(inside.shape[1])
    begin = np.maximum.accumulate(np.where(starts, column, 0), axis=1)  # of the latest span
    inside = inside & (documents == np.take_along_axis(documents, begin, axis=1)) & (documents > 0)
    return inside, starts & inside


def _shift_right(values: Int[np.ndarray, "rows n"]) -> Int[np.ndarray, "rows n"]:
    return np.pad(values, ((0, 0), (1, 0)))[:, :-1]


def _count_since(
    first: Bool[np.ndarray, "rows seq"], marks: Bool[np.ndarray, "rows seq"]
) -> Int[np.ndarray, "rows seq"]:
    """Return the running count of marks, int32, which restarts at each `first`.

    The marks 1 0 1 1 with first = 1 0 0 1 give 1 1 2 1.
    """
    count = np.cumsum(marks, axis=1, dtype=np.int32)
    count_before = count - marks
    return count - np.maximum.accumulate(np.where(first, count_before, 0), axis=1)


def _last_in_document(
    inside: Bool[np.ndarray, "rows seq"], documents: Int[np.ndarray, "rows seq"]
) -> Bool[np.ndarray, "rows seq"]:
    """Return the last position of each document that is inside a span: the first one when the row is read backwards."""
    reversed_documents = documents[:, ::-1]
    first = reversed_documents != _shift_right(reversed_documents)
    count = _count_since(first, inside[:, ::-1])[:, ::-1]
    return inside & (count == 1)


def _gather_left(values: np.ndarray, keep: Bool[np.ndarray, "rows n"], length: int) -> Int[np.ndarray, "rows length"]:
    """Return the kept values of each row without gaps, int32, padded with 0: 7 8 9 with keep 1 0 1 gives 7 9 0."""
    row, _ = np.nonzero(keep)
    column = (np.cumsum(keep, axis=1) - 1)[keep]
    result = np.zeros((len(values), length), np.int32)
    result[row, column] = values[keep]
    return result
