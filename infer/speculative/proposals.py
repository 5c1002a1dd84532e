"""Propose tokens, by prompt look-up or a draft model, and accept them so that the distribution stays the model's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from infer.sampling import History, SamplerState, distribution
from infer.sampling.selection import draw
from model import KVCache, ModelConfig, Params, head
from model.transformer import forward_cached


def look_up(history: History, count: int, ahead: int) -> tuple[Int[Array, "batch ahead"], Bool[Array, " batch"]]:
    """Return the tokens after the latest earlier occurrence of each row's last `count` tokens (Saxena 2023).

    Also returns whether there is one; the tokens are arbitrary if not. If fewer than `ahead` tokens follow the
    occurrence, they are repeated. Example with count = 2 and ahead = 4: in 5 1 2 7 1 2 the last two tokens occur at
    index 1, the three tokens 7 1 2 follow, and the proposal is 7 1 2 7.
    """
    tokens, lengths = history.tokens, history.lengths
    starts = tokens.shape[1] - count
    last = jnp.maximum(lengths[:, None] - count + jnp.arange(count)[None], 0)
    pattern = jnp.take_along_axis(tokens, last, axis=1)
    matches = jnp.stack([tokens[:, i : i + starts] == pattern[:, i : i + 1] for i in range(count)]).all(axis=0)
    start = jnp.arange(starts)[None]
    is_earlier = start + count < lengths[:, None]
    latest = jnp.max(jnp.where(matches & is_earlier, start, -1), axis=1)
    after = latest + count
    following = jnp.maximum(lengths - after, 1)
    positions = after[:, None] + jnp.arange(ahead)[None] % following[:, None]
    return jnp.take_along_axis(tokens, positions, axis=1), latest >= 0


def propose(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    history: History,
    sampler: SamplerState,
    num_proposed: Int[Array, " batch"],
    ahead: int,
) -> tuple[Int[Array, "batch ahead"], Float[Array, "batch ahead vocab"], KVCache]:
    """Sample proposals from the draft model; return them, the probabilities they were drawn from, and its cache.

    num_proposed: proposals per row, at most `ahead`; later ones are arbitrary. Before the call the cache lacks the last
    one or two tokens of the history; after it, in rows with proposals, it lacks the last proposal only.
    """
    keys = keys_ahead(sampler, history, ahead)

    def choose(hidden: Array, tokens: Array, step: Array | int) -> tuple[Array, Array, Array]:
        """Draw proposal `step` after the history `tokens`; return it, the history with it, and the probabilities."""
        now = history.replace(tokens=tokens, lengths=history.lengths + step)
        draft = probabilities(sampler, head(config, params, hidden), now)
        token = draw(jax.vmap(lambda row: jax.random.fold_in(row[step], 0))(keys), draft)
        return token, append(now, token[:, None], (step < num_proposed).astype(jnp.int32)).tokens, draft

    missing = cache.lengths[:, None] + jnp.arange(2)[None]
    chunk = jnp.take_along_axis(history.tokens, missing, axis=1, mode="clip")
    lengths = jnp.where(num_proposed > 0, history.lengths - cache.lengths, 0)
    hidden, cache = forward_cached(config, params, chunk, lengths, cache)
    token, tokens, draft = choose(hidden, history.tokens, 0)

    def propose_next(carry, step):
        token, tokens, cache = carry
        lengths = (step < num_proposed).astype(jnp.int32)
        hidden, cache = forward_cached(config, params, token[:, None], lengths, cache)
        token, tokens, draft = choose(hidden, tokens, step)
        return (token, tokens, cache), (token, draft)

    (_, _, cache), others = jax.lax.scan(propose_next, (token, tokens, cache), jnp.arange(1, ahead))

    def rows_first(first: Array, others: Array) -> Array:
        return jnp.moveaxis(jnp.concatenate([first[None], others]), 0, 1)

    return rows_first(token, others[0]), rows_first(draft, others[1]), cache


def accept(
    keys: Key[Array, "batch ahead_and_1"],
    target: Float[Array, "batch ahead_and_1 vocab"],
    draft: Float[Array, "batch ahead vocab"],
    proposed: Int[Array, "batch ahead"],
    num_proposed: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Return the number of accepted proposals of each row, and the token after them.

    The accepted proposals and that token are distributed as samples from `target` (Leviathan et al. 2023, algorithm 1
    and appendix A.1). Proposal x, drawn from q, is accepted with probability min(1, p(x) / q(x)). After the first
    rejection the token is drawn from max(p − q, 0), normalised; if all are accepted, from p.

    target: p at each position, given the proposals before it. draft: q of each proposal. num_proposed: proposals per
    row; later ones are ignored. keys: one per position, used only here and to draw the proposal.
    """
    ahead = proposed.shape[1]
    valid = jnp.arange(ahead)[None] < num_proposed[:, None]

    def uniform_of(key: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, 1), dtype=jnp.float32)

    def of_proposals(probabilities: Array) -> Array:
        return jnp.take_along_axis(probabilities[:, :ahead], proposed[..., None], axis=2)[..., 0]

    uniform = jax.vmap(jax.vmap(uniform_of))(keys[:, :ahead])
    accepted = valid & (uniform * of_proposals(draft) < of_proposals(target))
    # Proposals count up to the first rejection: accepted [1, 1, 0, 1] has cumulative product [1, 1, 0, 0] and sum 2.
    num_accepted = jnp.sum(jnp.cumprod(accepted, axis=1), axis=1)

    # q is 0 at positions without a proposal, so that max(p − q, 0) is p there.
    draft = jnp.pad(jnp.where(valid[..., None], draft, 0), ((0, 0), (0, 1), (0, 0)))

    def at_rejection(probabilities: Array) -> Array:
        return jnp.take_along_axis(probabilities, num_accepted[:, None, None], axis=1)[:, 0]

    residual = jnp.maximum(at_rejection(target) - at_rejection(draft), 0)
    # If p and q are equal up to rounding, a rejection may leave no residual.
    residual = jnp.where(jnp.any(residual > 0, axis=1, keepdims=True), residual, at_rejection(target))
    key = jax.vmap(lambda row_keys, position: jax.random.fold_in(row_keys[position], 2))(keys, num_accepted)
    return num_accepted.astype(jnp.int32), draw(key, residual)


def probabilities(
    sampler: SamplerState, logits: Float[Array, "batch vocab"], history: History
) -> Float[Array, "batch vocab"]:
    """Return `infer.sampling.distribution`, but 0 if every token is banned: no proposal is accepted, id 0 is drawn."""
    return jnp.nan_to_num(distribution(sampler, logits, history))


def keys_ahead(sampler: SamplerState, history: History, count: int) -> Key[Array, "batch count"]:
    """Return a key for each of the next `count` positions of every row's output.

    A position has the same key however many rounds it took to get there.
    """
    output_lengths = history.lengths - history.prompt_lengths

    def of_row(key: Array, output_length: Array) -> Array:
        return jax.vmap(lambda place: jax.random.fold_in(key, output_length + place))(jnp.arange(count))

    return jax.vmap(of_row)(sampler.keys, output_lengths)


def append(history: History, tokens: Int[Array, "batch count"], counts: Int[Array, " batch"]) -> History:
    """Append the first `counts` of each row's tokens to the history."""
    place = jnp.arange(tokens.shape[1])

    def write(row: Array, new: Array, length: Array, count: Array) -> Array:
        positions = jnp.where(place < count, length + place, row.shape[0])  # beyond the end: dropped
        return row.at[positions].set(new, mode="drop")

    written = jax.vmap(write)(history.tokens, tokens, history.lengths, counts)
    return history.replace(tokens=written, lengths=history.lengths + counts)
