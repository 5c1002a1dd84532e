"""Select tokens by weight in a few passes over the vocabulary; a sort would cost ten times more."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

_BLOCK, _WIDTH = 128, 1024


def ordered(values: Float[Array, "batch vocab"]) -> UInt32[Array, "batch vocab"]:
    """Return unsigned integers that sort as the values do in float32; −0 and 0 are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def total(weights: Float[Array, "batch vocab"]) -> Float[Array, " batch"]:
    """Return the sum of each row by pairwise summation: the error grows with the logarithm of the width.

    Each step adds the two halves of a row, which keeps vector units busy. The order of additions is fixed and rounded
    addition is monotone, so increasing a weight never decreases the sum.
    """
    weights = _pad_to_halve(weights)
    while weights.shape[-1] > _WIDTH:
        half = weights.shape[-1] // 2
        weights = weights[:, :half] + weights[:, half:]
    return jnp.sum(weights, axis=-1)


def _pad_to_halve(values: Array) -> Array:
    """Pad each row with zeros to a width that can be halved until it is at most _WIDTH.

    Example: width 5,000 takes three halvings to get below 1,024 and is a multiple of 2³; width 5,001 becomes 5,008.
    """
    width = values.shape[-1]
    halvings = max(0, (-(-width // _WIDTH) - 1).bit_length())
    return jnp.pad(values, ((0, 0), (0, -width % 2**halvings)))


def argmax(values: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """Return the first index of each row's largest value.

    First the block, then the index within it: a search for an index over the whole row does not use vector units.
    """
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
    """Mark the smallest set of each row's tokens whose weights add up to the target.

    Tokens are taken by descending `order`, ties by ascending index. target: above 0, at most `total(weights)`. Tokens
    of equal order must have equal weights, or 0. Example: order [3, 9, 3, 5], weights [.1, .5, .1, .3] and target 0.85
    mark [1, 1, 0, 1]: 0.5 + 0.3 + 0.1, the first of the two tokens with order 3.
    """
    vocab = order.shape[-1]
    order, weights = _pad_to_halve(order), _pad_to_halve(weights)

    def set_next_bit(bit: Int[Array, ""], threshold: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
        higher = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        reached = total(jnp.where(order >= higher[:, None], weights, 0)) >= target
        return jnp.where(reached, higher, threshold)

    # Binary search, from the highest bit down, for the highest threshold whose tokens reach the target. It is always
    # the order of some token.
    threshold = jax.lax.fori_loop(0, 32, set_next_bit, jnp.zeros(len(order), jnp.uint32))[:, None]
    above, level = order > threshold, (order == threshold) & (weights > 0)
    missing = target - total(jnp.where(above, weights, 0))
    weight_at_threshold = jnp.max(jnp.where(level, weights, 0), axis=-1)
    needed = jnp.ceil(missing / weight_at_threshold)

    def first_needed() -> Bool[Array, "batch vocab"]:
        return level & (jnp.cumsum(level, axis=-1) <= needed[:, None])

    tied = jnp.any(total(level.astype(weights.dtype)) > needed)
    return (above | jax.lax.cond(tied, first_needed, lambda: level))[:, :vocab]


def draw(keys: Key[Array, " batch"], weights: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """Draw an index per row with probability proportional to its weight, never one of weight 0.

    Inverts the distribution function twice, over blocks of tokens and within one block: two uniform numbers per row,
    where Gumbel noise takes one per token. Returns 0 if all weights are 0.
    """
    blocks = _blocks(weights, 0)
    # Uniform numbers are multiples of 2⁻²³, moved by half a step: 0 would draw the first token however unlikely it is.
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys) + 2.0**-24
    block = _invert(jnp.sum(blocks, axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * blocks.shape[-1] + _invert(within, uniform[:, 1])).astype(jnp.int32)


def _invert(weights: Float[Array, "batch count"], uniform: Float[Array, " batch"]) -> Int[Array, " batch"]:
    # Rounding may increase the cumulative sum at a weight of 0, so those indices are excluded. The largest remaining
    # sum exceeds its product with a number of at most 1 − 2⁻²⁴, so at least one index is always left.
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    return jnp.argmax(cumulative > (uniform * jnp.max(cumulative, axis=-1))[:, None], axis=-1)
