"""Selecting tokens by weight in a few passes over the vocabulary, without the sort that would cost ten times more."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

_BLOCK, _WIDTH = 128, 1024


def ordered(values: Float[Array, "batch vocab"]) -> UInt32[Array, "batch vocab"]:
    """Unsigned integers in the order of float32 values; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def total(weights: Float[Array, "batch vocab"]) -> Float[Array, " batch"]:
    """The sum of each row, by halves: error grows with the logarithm of the width, and vectors stay full.

    Rounded addition is monotone, so no weight that grows makes a sum in this fixed order smaller.
    """
    weights = _evened(weights)
    while weights.shape[-1] > _WIDTH:
        half = weights.shape[-1] // 2
        weights = weights[:, :half] + weights[:, half:]
    return jnp.sum(weights, axis=-1)


def _evened(values: Array) -> Array:
    """Padded by zeros to a width that halves without a rest until it is at most _WIDTH."""
    width = values.shape[-1]
    halvings = max(0, (-(-width // _WIDTH) - 1).bit_length())
    return jnp.pad(values, ((0, 0), (0, -width % 2**halvings)))


def argmax(values: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The first index of each row's largest value, by blocks: a search for an index alone does not fill vectors."""
    blocks = _blocks(values, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * blocks.shape[-1] + jnp.argmax(within, axis=-1)).astype(jnp.int32)


def _blocks(values: Array, fill: float) -> Array:
    batch, vocab = values.shape
    size = min(vocab, _BLOCK)
    return jnp.pad(values, ((0, 0), (0, -vocab % size)), constant_values=fill).reshape(batch, -1, size)


def first_to_reach(
    order: UInt32[Array, "batch vocab"], weights: Float[Array, "batch vocab"], target: Float[Array, " batch"]
) -> Bool[Array, "batch vocab"]:
    """The smallest set of a row's tokens, taken by falling `order` and then by index, whose weights reach target.

    target: above 0, at most `total(weights)`. Tokens of equal order must have equal weights, or 0.
    """
    vocab = order.shape[-1]
    order, weights = _evened(order), _evened(weights)

    def halve(round: Int[Array, ""], threshold: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
        higher = threshold | (jnp.uint32(1 << 31) >> round.astype(jnp.uint32))
        reached = total(jnp.where(order >= higher[:, None], weights, 0)) >= target
        return jnp.where(reached, higher, threshold)

    # The highest threshold at which the target is reached, one bit a round: always the order of some token.
    threshold = jax.lax.fori_loop(0, 32, halve, jnp.zeros(len(order), jnp.uint32))[:, None]
    above, level = order > threshold, (order == threshold) & (weights > 0)
    missing = target - total(jnp.where(above, weights, 0))
    share = jnp.max(jnp.where(level, weights, 0), axis=-1)
    needed = jnp.ceil(missing / share)

    def by_index() -> Bool[Array, "batch vocab"]:
        return level & (jnp.cumsum(level, axis=-1) <= needed[:, None])

    tied = jnp.any(total(level.astype(weights.dtype)) > needed)
    return (above | jax.lax.cond(tied, by_index, lambda: level))[:, :vocab]


def draw(keys: Key[Array, " batch"], weights: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """An index for every row with probability in proportion to its weight, never one of weight 0.

    The distribution function is inverted twice, over blocks of tokens and within one: two uniform numbers a row where
    Gumbel noise takes one a token. Where all weights are 0, the index is 0.
    """
    blocks = _blocks(weights, 0)
    # Multiples of 2⁻²³ from 0 on, moved to the middle of their steps: 0 would draw the first token however unlikely.
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys) + 2.0**-24
    block = _invert(jnp.sum(blocks, axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * blocks.shape[-1] + _invert(within, uniform[:, 1])).astype(jnp.int32)


def _invert(weights: Float[Array, "batch count"], uniform: Float[Array, " batch"]) -> Int[Array, " batch"]:
    # Rounding may raise the cumulative sum where a weight is 0, so that such places are left out by name. The largest
    # of the others exceeds its product with at most 1 − 2⁻²⁴, so that one place is always left.
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    return jnp.argmax(cumulative > (uniform * jnp.max(cumulative, axis=-1))[:, None], axis=-1)
