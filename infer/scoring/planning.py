"""Plan the batches of a call of `infer.score`: which prefixes are read once, and which rows continue them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infer.scoring.batches import BatchPlan, Limits, Prefix, ScoredRow, plan_branches, plan_rows
from infer.scoring.packing import PackedBatch, PackedPlan, batch_tokens, plan_packed
from infer.scoring.prefixes import SharedPrefix, packed_prefixes, shared_prefixes
from infer.scoring.requests import IdPair
from model import ModelConfig

WORTH_BRANCHING = 0.8  # share prefixes only if at most this fraction of the tokens is read


def plan_encoder_decoder(config: ModelConfig, pairs: Sequence[IdPair], limits: Limits, share: bool) -> BatchPlan:
    """Return a plan with a prefix per context, which the encoder reads; equal contexts are one prefix if shared."""
    prefixes: dict[Any, Prefix] = {}
    for number, (context, continuation) in enumerate(pairs):
        tokens = np.concatenate([[config.decoder_start_token_id], continuation[:-1]]).astype(np.int32)
        prefix = prefixes.setdefault(context.tobytes() if share else number, Prefix(context, []))
        prefix.rows.append(ScoredRow(number, tokens, continuation))
    return plan_branches(prefixes.values(), [], limits)


def plan_decoder(pairs: Sequence[IdPair], limits: Limits, share: bool) -> BatchPlan | PackedPlan:
    """Return the plan that reads the fewest tokens: whole rows, or packed or shared prefixes if these save a fifth."""
    rows = [ScoredRow(number, np.concatenate([*pair])[:-1], pair[1]) for number, pair in enumerate(pairs)]
    whole = plan_rows(rows, limits)
    if not share:
        return whole
    rows.sort(key=lambda row: (row.tokens.astype(">i4").tobytes(), row.targets.tobytes()))  # big-endian: lexicographic
    # The last token of a context is read with the continuation, since it predicts the first target.
    shareable = [len(row.tokens) - len(row.targets) for row in rows]
    choices = shared_prefixes([row.tokens for row in rows], shareable)
    plans: list[BatchPlan | PackedPlan] = [_plan_shared(rows, choice, limits) for choice in choices if choice]
    prefixes = packed_prefixes([row.tokens for row in rows], shareable, batch_tokens(rows, limits))
    plans.append(plan_packed(rows, prefixes, limits))
    best = min((plan for plan in plans if plan), key=tokens_read, default=whole)
    return best if tokens_read(best) <= WORTH_BRANCHING * tokens_read(whole) else whole


def tokens_read(plan: BatchPlan | PackedPlan) -> int:
    """Return the tokens that the programs of a plan read, including padding."""
    total = 0
    for shape, batches in plan:
        stems: set[int] = set()
        for batch in batches:
            ends = [batch.stem] if isinstance(batch, PackedBatch) else [prefix.stem for prefix in batch.prefixes]
            stems.update(map(id, ends))
        total += shape.cost * len(batches) + shape.stem_width * len(stems)
    return total


def _plan_shared(rows: Sequence[ScoredRow], shared: Sequence[SharedPrefix], limits: Limits) -> BatchPlan:
    stems: dict[bytes, np.ndarray] = {}  # equal stems are one array, by which batches recognise them
    prefixes, whole = [], set(range(len(rows)))
    for one in shared:
        members = range(one.low, one.high)
        whole.difference_update(members)
        tokens = rows[one.low].tokens
        stem = tokens[: one.stem_length]
        stem = stems.setdefault(stem.tobytes(), stem)
        continued = [rows[row]._replace(tokens=rows[row].tokens[one.length :]) for row in members]
        prefixes.append(Prefix(tokens[one.stem_length : one.length], continued, stem if one.stem_length else None))
    return plan_branches(prefixes, [rows[row] for row in sorted(whole)], limits)
