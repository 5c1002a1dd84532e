"""Several tokens for one pass of the model: something cheap proposes, the model checks all proposals at once and keeps
those that leave its own distribution unchanged (Leviathan et al. 2023; Chen et al. 2023)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from infer.decode import FULL, RUNNING, STOPPED, Emitted, Rows, begin, grow_rows, halted, nothing_yet
from infer.generate import Completion, Generated, columns, one_row_each, one_sampling_each, start_rows, words_after
from infer.prompts import Prompt, capacity_for, check_prompts, read_prompts
from infer.proposals import accept, followed, keys_ahead, look_up, probabilities, propose
from infer.sampler import History, describe
from infer.sampling import Sampling
from infer.text import Decoder
from model import Execution, ModelConfig, Params, head
from model.ambient import lenient
from model.cache import grow, rewind
from model.checks import check_whole
from model.dtypes import DTypeLike
from model.errors import InputError
from model.sharding import under_mesh_of
from model.transformer import forward_cached

ROUNDS = 8  # of proposing and checking that one call can make
LONGEST_LOOKUP = 32


@dataclasses.dataclass(frozen=True)
class Speculated(Generated):
    """As `Generated`; of every row also how many tokens were proposed for it, and how many of them the model took."""

    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Share of all proposals that were taken; NaN where there was none."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else float("nan")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program is compiled for. draft: None looks the last `lookup` tokens up; ahead: most proposals a round."""

    config: ModelConfig
    draft: ModelConfig | None
    lookup: int
    ahead: int


class Carried(struct.PyTreeNode):
    """What rounds carry on. Leaves are Any because JAX also fills the tree with shapes and shardings.

    A running row's cache holds its history but for the newest token; the draft's may lack one more.
    """

    rows: Rows
    draft_cache: Any  # KVCache, or None without a draft
    drafted: Any  # int32 [batch]
    accepted: Any  # int32 [batch]


@lenient()
def generate_speculative(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    draft: tuple[ModelConfig, Params] | None = None,
    lookup: int = 3,
    tokens_ahead: int = 4,
    max_new_tokens: int = 64,
    key: PRNGKeyArray | None = None,
    tokenizer: Decoder | None = None,
    cache_dtype: DTypeLike | None = None,
    execution: Execution = Execution(),
) -> Speculated:
    """As `generate`, in fewer passes of the model: the same distribution, and at temperature 0 the same tokens.

    Where two logits lie within rounding of each other, a pass over several tokens may rank them otherwise than a pass
    over one. A seed's draws are others than those of `generate`.

    draft: a smaller model of the same vocabulary, which draws each row's proposals with the row's own settings.
    Without one the last `lookup` tokens are looked up in prompt and output, and what followed them when they last
    came is proposed (prompt look-up, Saxena 2023); a row where they never came before gets one token a round.
    tokens_ahead: most proposals in a round. The other arguments are `generate`'s.
    Raises InputError as `generate` does, and on a draft that cannot follow the model.
    """
    check_prompts(config, prompts, max_new_tokens)
    samplings = one_sampling_each(sampling, len(prompts), tokenizer)
    draft_config, draft_params = (None, None) if draft is None else draft
    plan = Plan(config, draft_config, lookup if draft is None else 0, tokens_ahead)
    _check(plan, prompts, max_new_tokens)
    with under_mesh_of(params):
        read = functools.partial(
            read_prompts,
            prompts=prompts,
            copies=[one.n for one in samplings],
            cache_dtype=cache_dtype,
            spare=tokens_ahead + 1,
            execution=execution,
        )
        logits, cache = read(config, params)
        draft_cache = None if draft is None else read(*draft)[1]
        prompts, samplings = one_row_each(config, prompts, samplings)
        rows, first = begin(start_rows(config, prompts, samplings, cache, max_new_tokens, key), logits)
        zeros = jnp.zeros((2, len(prompts)), jnp.int32)
        carried = Carried(rows, draft_cache, zeros[0], zeros[1])
        return _loop(plan, params, draft_params, carried, first, prompts, samplings, max_new_tokens, tokenizer)


def _loop(plan, params, draft_params, carried, first, prompts, samplings, max_new_tokens, tokenizer) -> Speculated:
    """Calls of several rounds, each under way while the host reads the one before."""
    completions = [
        Completion(one, words_after(tokenizer, prompt, one)) for prompt, one in zip(prompts, samplings, strict=True)
    ]
    filled = max(map(len, prompts))  # at most so many tokens stand in a row's cache
    end = filled + max_new_tokens - 1
    coming = (first, filled + np.zeros(1, np.int32), carried.drafted + 0, carried.accepted + 0)
    while True:
        rounds, upcoming = 0, coming
        if max_new_tokens > 1:
            halt = np.array([one.finish_reason is not None for one in completions])
            needed = min(filled + plan.ahead + 1, end)
            if needed > carried.rows.cache.capacity:
                carried = _grown(plan, carried, needed)
            room = carried.rows.cache.capacity - filled
            rounds = ROUNDS if end - filled <= room else min(ROUNDS, room // (plan.ahead + 1))
            carried, upcoming = speculate(plan, params, draft_params, carried, np.int32(rounds), halt)
        emitted, held, drafted, accepted = jax.device_get(coming)
        for row, completion in enumerate(completions):
            completion.read(emitted, row)
        if all(one.finish_reason for one in completions):
            break
        filled = min(int(held.max()) + rounds * (plan.ahead + 1), end)
        coming = upcoming
    return Speculated(**columns(completions), drafted=drafted.tolist(), accepted=accepted.tolist())


def _grown(plan: Plan, carried: Carried, length: int) -> Carried:
    rows, cache = carried.rows, carried.draft_cache
    rows = grow_rows(plan.config, rows, capacity_for(plan.config, length))
    if plan.draft is not None and cache.capacity < length:
        cache = grow(plan.draft, cache, capacity_for(plan.draft, length))
    return carried.replace(rows=rows, draft_cache=cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
@lenient()
def speculate(
    plan: Plan,
    params: Params,
    draft_params: Params | None,
    carried: Carried,
    rounds: Int[Array, ""],
    halt: Bool[Array, " batch"],
) -> tuple[Carried, tuple[Emitted, Array, Array, Array]]:
    """Up to `rounds` ≤ ROUNDS rounds, fewer once no row runs: every running row gets 1 … ahead + 1 tokens in each.

    halt: rows that are stopped first. Also returned: what was made, how many tokens each row's cache holds, and how
    many were drafted and accepted so far. The cache must have room for `rounds` · (ahead + 1) tokens, or for each row's
    limit; `carried` is donated.
    """
    carried = carried.replace(rows=halted(carried.rows, halt))
    emitted = nothing_yet(carried.rows, ROUNDS * (plan.ahead + 1))

    def go_on(carry):
        number, carried, _ = carry
        return (number < rounds) & jnp.any(carried.rows.status == RUNNING)

    def body(carry):
        number, carried, emitted = carry
        carried, made = _round(plan, params, draft_params, carried)
        return number + 1, carried, _put(emitted, made, number * (plan.ahead + 1))

    _, carried, emitted = jax.lax.while_loop(go_on, body, (jnp.int32(0), carried, emitted))
    return carried, (emitted, carried.rows.cache.lengths, carried.drafted, carried.accepted)


def _put(emitted: Emitted, made: Emitted, place: Int[Array, ""] | int) -> Emitted:
    """What was made, put down from this place on; the status is the newest."""
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, place, 1) if new.ndim > 1 else new
    return jax.tree.map(put, emitted, made)


def _round(plan: Plan, params: Params, draft_params: Params | None, carried: Carried) -> tuple[Carried, Emitted]:
    rows, history = carried.rows, carried.rows.history
    left = rows.limits - (history.lengths - history.prompt_lengths)
    wanted = jnp.where(rows.status == RUNNING, jnp.minimum(plan.ahead, left - 1), 0)
    if plan.draft is not None:
        assert draft_params is not None
        proposed, weights, draft_cache = propose(
            plan.draft, draft_params, carried.draft_cache, history, rows.sampler, wanted, plan.ahead
        )
        carried = carried.replace(draft_cache=draft_cache)
        return _take(plan, params, carried, proposed, weights, wanted)
    proposed, found = look_up(history, plan.lookup, plan.ahead)
    wanted = jnp.where(found, wanted, 0)

    def some() -> tuple[Carried, Emitted]:
        return _take(
            plan,
            params,
            carried,
            proposed,
            jax.nn.one_hot(proposed, rows.sampler.bias.shape[1], dtype=jnp.float32),
            wanted,
        )

    def none() -> tuple[Carried, Emitted]:  # nothing to check
        no_weights = jnp.zeros((len(proposed), 0, rows.sampler.bias.shape[1]), jnp.float32)
        alone, made = _take(plan, params, carried, proposed[:, :0], no_weights, wanted)
        return alone, _put(nothing_yet(rows, plan.ahead + 1), made, 0)

    return jax.lax.cond(jnp.any(wanted > 0), some, none)


def _take(
    plan: Plan,
    params: Params,
    carried: Carried,
    proposed: Int[Array, "batch ahead"],
    weights: Float[Array, "batch ahead vocab"],
    wanted: Int[Array, " batch"],
) -> tuple[Carried, Emitted]:
    """One pass of the model over the proposals, drawn from `weights`, of which each row wants its first `wanted`."""
    rows, history = carried.rows, carried.rows.history
    running, ahead = rows.status == RUNNING, proposed.shape[1]
    chunk = jnp.concatenate([rows.token[:, None], proposed], axis=1)
    lengths = jnp.where(running, wanted + 1, 0)
    hidden, cache = forward_cached(plan.config, params, chunk, lengths, rows.cache, every=True)
    logits = head(plan.config, params, hidden)
    at = followed(history, proposed, wanted).replace(lengths=history.lengths[:, None] + jnp.arange(ahead + 1)[None])
    target = jax.vmap(probabilities, in_axes=(None, 1, History(None, None, 1)), out_axes=1)(rows.sampler, logits, at)
    keys = keys_ahead(rows.sampler, history, ahead + 1)
    taken, token = accept(keys, target, weights, proposed, wanted)

    place = jnp.arange(ahead + 1)[None]
    tokens = jnp.where(place < taken[:, None], chunk[:, jnp.minimum(place[0] + 1, ahead)], token[:, None])
    stops = jnp.any(tokens[:, :, None] == rows.stop_ids[:, None], axis=-1) & (place <= taken[:, None])
    stopped = running & jnp.any(stops, axis=1)
    upto = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32), taken + 1)
    count = jnp.where(running, upto, 0)
    after = followed(history, tokens, count)
    full = running & ~stopped & (after.lengths - after.prompt_lengths >= rows.limits)
    status = jnp.where(stopped, STOPPED, jnp.where(full, FULL, rows.status))
    held = jnp.where(running, after.lengths - 1, cache.lengths)
    draft_cache = carried.draft_cache
    if draft_cache is not None:
        draft_cache = rewind(draft_cache, jnp.minimum(draft_cache.lengths, held))
    last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], 1)[:, 0]
    rows = rows.replace(
        token=jnp.where(count > 0, last, rows.token), cache=rewind(cache, held), history=after, status=status
    )
    carried = carried.replace(
        rows=rows,
        draft_cache=draft_cache,
        drafted=carried.drafted + wanted,
        accepted=carried.accepted + taken,
    )
    return carried, _described(rows, logits, jnp.where(place < count[:, None], tokens, -1))


def _described(rows: Rows, logits: Float[Array, "batch room vocab"], tokens: Int[Array, "batch room"]) -> Emitted:
    """As `infer.sampler.describe`, of several tokens of every row."""
    asked = jnp.any(rows.sampler.logprobs > 0)
    flat = describe(asked, logits.reshape(-1, logits.shape[-1]), jnp.maximum(tokens, 0).reshape(-1))
    made = jax.tree.map(lambda leaf: leaf.reshape(*tokens.shape, *leaf.shape[1:]), flat)
    return Emitted(tokens, made.logprob, made.top_ids, made.top_logprobs, rows.status)


def _check(plan: Plan, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    config, draft = plan.config, plan.draft
    check_whole("tokens_ahead", plan.ahead, 1, hint="4 is usual")
    if draft is None:
        check_whole("lookup", plan.lookup, 1, LONGEST_LOOKUP, hint="3 is usual")
        return
    if draft.stack != config.stack or draft.head != config.head:
        raise InputError(
            f"a draft with stack={draft.stack!r} and head={draft.head!r} cannot propose for a model with "
            f"stack={config.stack!r} and head={config.head!r}; give one of the same kind"
        )
    if draft.vocab_size != config.vocab_size:
        raise InputError(
            f"the draft's vocabulary of {draft.vocab_size} tokens is not the model's of {config.vocab_size}; "
            "give a draft with the model's tokenizer, or none to look tokens up in the prompt"
        )
    try:
        check_prompts(draft, prompts, max_new_tokens)
    except InputError as error:
        raise InputError(f"the draft cannot follow: {error}") from error
