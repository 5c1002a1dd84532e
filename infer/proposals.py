"""Tokens that a cheaper source thinks will come, and which of them the model takes: see `infer.speculative`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from infer.sampler import History, SamplerState, distribution
from infer.selection import draw
from model import KVCache, ModelConfig, Params, head
from model.transformer import forward_cached


def look_up(history: History, count: int, ahead: int) -> tuple[Int[Array, "batch ahead"], Bool[Array, " batch"]]:
    """What followed each row's last `count` tokens when they last came before, and whether they did (Saxena 2023).

    Where fewer than `ahead` tokens followed, the row's end is among them, and what it repeats goes on.
    """
    tokens, lengths = history.tokens, history.lengths
    starts = tokens.shape[1] - count
    at = jnp.maximum(lengths[:, None] - count + jnp.arange(count)[None], 0)
    pattern = jnp.take_along_axis(tokens, at, axis=1)
    alike = jnp.stack([tokens[:, i : i + starts] == pattern[:, i : i + 1] for i in range(count)]).all(axis=0)
    start = jnp.arange(starts)[None]
    latest = jnp.max(jnp.where(alike & (start + count < lengths[:, None]), start, -1), axis=1)
    after = latest + count
    places = after[:, None] + jnp.arange(ahead)[None] % jnp.maximum(lengths - after, 1)[:, None]
    return jnp.take_along_axis(tokens, places, axis=1), latest >= 0


def propose(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    history: History,
    sampler: SamplerState,
    wanted: Int[Array, " batch"],
    ahead: int,
) -> tuple[Int[Array, "batch ahead"], Float[Array, "batch ahead vocab"], KVCache]:
    """What the draft model goes on with, the probabilities that it drew from, and its cache.

    wanted: how many proposals each row has; those beyond mean nothing. The cache lacks one or two tokens of the
    history; of a row that wants proposals it then holds all of them but the last.
    """
    keys = keys_ahead(sampler, history, ahead)

    def choose(hidden: Array, tokens: Array, place: Array | int) -> tuple[Array, Array, Array]:
        now = history.replace(tokens=tokens, lengths=history.lengths + place)
        weights = probabilities(sampler, head(config, params, hidden), now)
        token = draw(jax.vmap(lambda row: jax.random.fold_in(row[place], 0))(keys), weights)
        return token, followed(now, token[:, None], (place < wanted).astype(jnp.int32)).tokens, weights

    missing = cache.lengths[:, None] + jnp.arange(2)[None]
    chunk = jnp.take_along_axis(history.tokens, missing, axis=1, mode="clip")
    lengths = jnp.where(wanted > 0, history.lengths - cache.lengths, 0)
    hidden, cache = forward_cached(config, params, chunk, lengths, cache)
    token, tokens, weights = choose(hidden, history.tokens, 0)

    def step(carry, place):
        token, tokens, cache = carry
        lengths = (place < wanted).astype(jnp.int32)
        hidden, cache = forward_cached(config, params, token[:, None], lengths, cache)
        token, tokens, weights = choose(hidden, tokens, place)
        return (token, tokens, cache), (token, weights)

    (_, _, cache), others = jax.lax.scan(step, (token, tokens, cache), jnp.arange(1, ahead))
    joined = lambda first, rest: jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, 1)
    return joined(token, others[0]), joined(weights, others[1]), cache


def accept(
    keys: Key[Array, "batch ahead_and_1"],
    target: Float[Array, "batch ahead_and_1 vocab"],
    draft: Float[Array, "batch ahead vocab"],
    proposed: Int[Array, "batch ahead"],
    wanted: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """How many of each row's first `wanted` proposals are taken, and the token after them, so that all of them follow
    `target` (Leviathan et al. 2023, algorithm 1 and appendix A.1).

    Proposal d, drawn from q, is taken with probability min(1, p(d) / q(d)); after the first that is not, the token is
    drawn from max(p − q, 0), normalised; after all of them, from p. target: p after every number of proposals taken;
    draft: q of every proposal. keys: one for every place, used nowhere else but in the proposal's own draw.
    """
    ahead = proposed.shape[1]
    valid = jnp.arange(ahead)[None] < wanted[:, None]
    draw_one = lambda key: jax.random.uniform(jax.random.fold_in(key, 1), dtype=jnp.float32)
    uniform = jax.vmap(jax.vmap(draw_one))(keys[:, :ahead])
    chosen = lambda weights: jnp.take_along_axis(weights[:, :ahead], proposed[..., None], axis=2)[..., 0]
    taken = jnp.sum(jnp.cumprod(valid & (uniform * chosen(draft) < chosen(target)), axis=1), axis=1)
    # Beyond the proposals q is 0, and what is left of p is all of it.
    draft = jnp.pad(jnp.where(valid[..., None], draft, 0), ((0, 0), (0, 1), (0, 0)))
    here = lambda values: jnp.take_along_axis(values, taken[:, None, None], axis=1)[:, 0]
    left = jnp.maximum(here(target) - here(draft), 0)
    # Two equal distributions may differ by rounding where a proposal is refused, and then leave nothing.
    left = jnp.where(jnp.any(left > 0, axis=1, keepdims=True), left, here(target))
    key = jax.vmap(lambda keys, place: jax.random.fold_in(keys[place], 2))(keys, taken)
    return taken.astype(jnp.int32), draw(key, left)


def probabilities(
    sampler: SamplerState, logits: Float[Array, "batch vocab"], history: History
) -> Float[Array, "batch vocab"]:
    """As `infer.sampler.distribution`, but 0 where every token is banned: then none is taken, and id 0 is drawn."""
    return jnp.nan_to_num(distribution(sampler, logits, history))


def keys_ahead(sampler: SamplerState, history: History, count: int) -> Key[Array, "batch count"]:
    """A key for each of the output's next places: a place's draws are the same however the rounds before it fell."""
    made = history.lengths - history.prompt_lengths
    fold = lambda key, made: jax.vmap(lambda place: jax.random.fold_in(key, made + place))(jnp.arange(count))
    return jax.vmap(fold)(sampler.keys, made)


def followed(history: History, tokens: Int[Array, "batch count"], counts: Int[Array, " batch"]) -> History:
    """The history with the first `counts` of each row's tokens after it."""
    place = jnp.arange(tokens.shape[1])
    write = lambda row, new, at, count: row.at[jnp.where(place < count, at + place, row.shape[0])].set(new, mode="drop")
    written = jax.vmap(write)(history.tokens, tokens, history.lengths, counts)
    return history.replace(tokens=written, lengths=history.lengths + counts)
