"""Rounds of speculative decoding on the device: propose several tokens, verify them in one pass of the model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from infer.decode import FULL, RUNNING, STOPPED, DecodeState, Emitted, halt_rows, nothing_emitted
from infer.sampling import History, describe
from infer.speculative.proposals import accept, append, keys_ahead, look_up, probabilities, propose
from model import ModelConfig, Params, head
from model.ambient import lenient
from model.cache import rewind
from model.transformer import forward_cached

ROUNDS = 8  # most rounds in one call of `speculate`


@dataclasses.dataclass(frozen=True)
class SpeculationSettings:
    """The static settings of a program.

    draft: the draft model; None: prompt look-up of the last `lookup` tokens. ahead: most proposals per row and round.
    """

    config: ModelConfig
    draft: ModelConfig | None
    lookup: int
    ahead: int


class SpeculationState(struct.PyTreeNode):
    """State between rounds. Leaves are Any because JAX also fills the tree with shapes and shardings.

    The model's cache lacks the newest token of a running row's history; the draft's cache may lack one more.
    """

    decoding: DecodeState
    draft_cache: Any  # KVCache, or None without a draft
    drafted: Any  # int32 [batch]: proposals so far
    accepted: Any  # int32 [batch]: accepted ones of these


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
@lenient()
def speculate(
    settings: SpeculationSettings,
    params: Params,
    draft_params: Params | None,
    state: SpeculationState,
    rounds: Int[Array, ""],
    halt: Bool[Array, " batch"],
) -> tuple[SpeculationState, tuple[Emitted, Array, Array, Array]]:
    """Run up to `rounds` ≤ ROUNDS rounds; stop early once no row runs. A round emits 1 … ahead + 1 tokens per row.

    halt: rows to stop before the first round. The cache must have room for rounds · (ahead + 1) tokens, or for each
    row's limit. Also returns the emitted tokens, each row's tokens in the cache, and its drafted and accepted
    proposals so far: int32 [batch] each. Donates the state.
    """
    state = state.replace(decoding=halt_rows(state.decoding, halt))
    emitted = nothing_emitted(state.decoding, ROUNDS * (settings.ahead + 1))

    def unfinished(carry):
        number, state, _ = carry
        return (number < rounds) & jnp.any(state.decoding.status == RUNNING)

    def body(carry):
        number, state, emitted = carry
        state, new = _round(settings, params, draft_params, state)
        return number + 1, state, _record(emitted, new, number * (settings.ahead + 1))

    _, state, emitted = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, emitted))
    return state, (emitted, state.decoding.cache.lengths, state.drafted, state.accepted)


def _record(emitted: Emitted, new: Emitted, column: Int[Array, ""] | int) -> Emitted:
    """Write the new tokens into `emitted` from this column on; the status is the new one."""

    def write(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, column, 1) if new.ndim > 1 else new

    return jax.tree.map(write, emitted, new)


def _round(
    settings: SpeculationSettings, params: Params, draft_params: Params | None, state: SpeculationState
) -> tuple[SpeculationState, Emitted]:
    decoding, history = state.decoding, state.decoding.history
    left = decoding.limits - (history.lengths - history.prompt_lengths)
    # A round emits one token more than it accepts, so at most left − 1 proposals are useful.
    num_proposed = jnp.where(decoding.status == RUNNING, jnp.minimum(settings.ahead, left - 1), 0)
    if settings.draft is not None:
        assert draft_params is not None
        proposed, draft, draft_cache = propose(
            settings.draft, draft_params, state.draft_cache, history, decoding.sampler, num_proposed, settings.ahead
        )
        state = state.replace(draft_cache=draft_cache)
        return _verify(settings, params, state, proposed, draft, num_proposed)
    proposed, found = look_up(history, settings.lookup, settings.ahead)
    num_proposed = jnp.where(found, num_proposed, 0)
    vocab = decoding.sampler.bias.shape[1]

    def verify_proposals() -> tuple[SpeculationState, Emitted]:
        draft = jax.nn.one_hot(proposed, vocab, dtype=jnp.float32)  # look-up proposes with certainty
        return _verify(settings, params, state, proposed, draft, num_proposed)

    def decode_one() -> tuple[SpeculationState, Emitted]:
        no_draft = jnp.zeros((len(proposed), 0, vocab), jnp.float32)
        after, new = _verify(settings, params, state, proposed[:, :0], no_draft, num_proposed)
        return after, _record(nothing_emitted(decoding, settings.ahead + 1), new, 0)

    return jax.lax.cond(jnp.any(num_proposed > 0), verify_proposals, decode_one)


def _verify(
    settings: SpeculationSettings,
    params: Params,
    state: SpeculationState,
    proposed: Int[Array, "batch ahead"],
    draft: Float[Array, "batch ahead vocab"],
    num_proposed: Int[Array, " batch"],
) -> tuple[SpeculationState, Emitted]:
    """Pass the newest token and the proposals through the model; append the accepted ones and one token after them.

    Example with ahead = 3: the newest token t and proposals a b c, of which a and b are accepted. The row appends a, b
    and a token x drawn in the place of c. The cache got t a b c and is rewound to end with b; x is the newest token.
    """
    decoding, history = state.decoding, state.decoding.history
    running, ahead = decoding.status == RUNNING, proposed.shape[1]
    chunk = jnp.concatenate([decoding.token[:, None], proposed], axis=1)
    lengths = jnp.where(running, num_proposed + 1, 0)
    hidden, cache = forward_cached(settings.config, params, chunk, lengths, decoding.cache, every=True)
    logits = head(settings.config, params, hidden)
    # Position i of the chunk predicts the token after i proposals: penalties see the history with those.
    histories = append(history, proposed, num_proposed)
    histories = histories.replace(lengths=history.lengths[:, None] + jnp.arange(ahead + 1)[None])
    at_each_position = jax.vmap(probabilities, in_axes=(None, 1, History(None, None, 1)), out_axes=1)
    target = at_each_position(decoding.sampler, logits, histories)
    keys = keys_ahead(decoding.sampler, history, ahead + 1)
    num_accepted, token = accept(keys, target, draft, proposed, num_proposed)

    # The new tokens of each row: its accepted proposals, the drawn token, then padding.
    place = jnp.arange(ahead + 1)[None]
    tokens = jnp.where(place < num_accepted[:, None], chunk[:, jnp.minimum(place[0] + 1, ahead)], token[:, None])
    stops = jnp.any(tokens[:, :, None] == decoding.stop_ids[:, None], axis=-1) & (place <= num_accepted[:, None])
    stopped = running & jnp.any(stops, axis=1)
    before_stop = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32), num_accepted + 1)
    count = jnp.where(running, before_stop, 0)
    after = append(history, tokens, count)
    full = running & ~stopped & (after.lengths - after.prompt_lengths >= decoding.limits)
    status = jnp.where(stopped, STOPPED, jnp.where(full, FULL, decoding.status))
    cache_lengths = jnp.where(running, after.lengths - 1, cache.lengths)
    draft_cache = state.draft_cache
    if draft_cache is not None:
        draft_cache = rewind(draft_cache, jnp.minimum(draft_cache.lengths, cache_lengths))
    newest = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], 1)[:, 0]
    decoding = decoding.replace(
        token=jnp.where(count > 0, newest, decoding.token),
        cache=rewind(cache, cache_lengths),
        history=after,
        status=status,
    )
    state = state.replace(
        decoding=decoding,
        draft_cache=draft_cache,
        drafted=state.drafted + num_proposed,
        accepted=state.accepted + num_accepted,
    )
    return state, _described(decoding, logits, jnp.where(place < count[:, None], tokens, -1))


def _described(
    state: DecodeState, logits: Float[Array, "batch room vocab"], tokens: Int[Array, "batch room"]
) -> Emitted:
    """Call `infer.sampling.describe` for several tokens per row."""
    with_top = jnp.any(state.sampler.logprobs > 0)
    flat = describe(with_top, logits.reshape(-1, logits.shape[-1]), jnp.maximum(tokens, 0).reshape(-1))
    choice = jax.tree.map(lambda leaf: leaf.reshape(*tokens.shape, *leaf.shape[1:]), flat)
    return Emitted(tokens, choice.logprob, choice.top_ids, choice.top_logprobs, state.status)
