"""Positions: sinusoidal, rotary, ALiBi and relative biases. Learned position tables are part of the embedding."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.parts import RopeScaling

RotaryTables = tuple[Float[Array, "rows seq half"], Float[Array, "rows seq half"]]


def sinusoidal(positions: Int[Array, "rows seq"], d_model: int) -> Float[Array, "rows seq d_model"]:
    """Return sines in the first half of the features, cosines in the second (Vaswani et al. 2017, section 3.5)."""
    angles = positions[..., None].astype(jnp.float32) * _frequencies(d_model, 10_000.0)[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotary_tables(
    positions: Int[Array, "rows seq"], features: int, base: float, scaling: RopeScaling | None = None
) -> RotaryTables:
    """Return (cos, sin) of the angles of every position, for `features` features in pairs: half = features / 2."""
    frequencies, factor = rotary_frequencies(features, base, scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "batch heads seq head_dim"], tables: RotaryTables, interleaved: bool = False
) -> Float[Array, "batch heads seq head_dim"]:
    """Rotate pairs of the first 2 · half features by their angles (Su et al. 2021); the others stay.

    Of 8 features, half = 4, the pairs are (0, 4), (1, 5), (2, 6), (3, 7) as in GPT-NeoX and Llama, or interleaved
    (0, 1), (2, 3), (4, 5), (6, 7) as in GPT-J and DeepSeek.
    """
    cos, sin = (table[:, None].astype(x.dtype) for table in tables)
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    # (a, b) becomes (a, b) · cos + (b, a) · (−sin, sin) = (a cos − b sin, b cos + a sin). Compilers turn the reversal
    # into an index; concatenating two halves would cost a copy.
    axis = -1 if interleaved else -2
    pairs = rotated.reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    sign = jnp.array([-1, 1], x.dtype).reshape((2,) if interleaved else (2, 1))
    cos, sin = (jnp.expand_dims(table, axis) for table in (cos, sin))
    rotated = (pairs * cos + jnp.flip(pairs, axis) * (sin * sign)).reshape(rotated.shape)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def rotary_frequencies(
    features: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Float[np.ndarray, " half"], float]:
    """Return the float32 frequency of every pair in radians per position, and the factor on cos and sin."""
    frequencies = _frequencies(features, base)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, features, base, scaling), _yarn_factor(scaling)


def score_factor(scaling: RopeScaling | None) -> float:
    """Return the factor on the scores of latent attention in DeepSeek's variant of YaRN."""
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " heads"]:
    """Return the slope of every head (Press et al. 2022).

    For a power of two they are a geometric series: 4 heads have 2⁻², 2⁻⁴, 2⁻⁶, 2⁻⁸. Other numbers add every second
    slope of the next power of two: 6 heads also have the first and third of 8 heads, 2⁻¹ and 2⁻³.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def series(heads: int) -> np.ndarray:
        return 2.0 ** (-8.0 / heads * np.arange(1, heads + 1))

    return np.concatenate([series(power), series(2 * power)[::2][: num_heads - power]]).astype(np.float32)


def alibi_bias(
    queries: Int[Array, "rows seq"], keys: Int[Array, "rows key"], num_heads: int
) -> Float[Array, "rows heads seq key"]:
    """Return the bias of scores, −slope · distance (Press et al. 2022, section 3)."""
    distance = jnp.abs(queries[:, :, None] - keys[:, None, :]).astype(jnp.float32)
    return distance[:, None] * -alibi_slopes(num_heads)[None, :, None, None]


def relative_bias(
    table: Float[Array, "buckets heads"],
    queries: Int[Array, "rows seq"],
    keys: Int[Array, "rows key"],
    max_distance: int,
    causal: bool,
) -> Float[Array, "rows heads seq key"]:
    """Return a learned bias per head and bucket of distance (T5, section 2.1).

    Half of the buckets are single distances, the others grow logarithmically up to max_distance. With 8 causal buckets
    and max_distance = 16 the distances 0, 1, 2, 3 have the buckets 0 … 3, then 4 and 5 have 4, 6 and 7 have 5, 8 … 11
    have 6, and all from 12 on have 7. Without causal masking, keys after the query have a second set of buckets.
    """
    offset = keys[:, None, :] - queries[:, :, None]
    buckets = table.shape[0] if causal else table.shape[0] // 2
    start = jnp.zeros_like(offset) if causal else jnp.where(offset > 0, buckets, 0)
    distance = jnp.maximum(-offset, 0) if causal else jnp.abs(offset)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = jnp.minimum(exact + (far * (buckets - exact)).astype(jnp.int32), buckets - 1)
    bucket = start + jnp.where(distance < exact, distance, far)
    return jnp.take(table, bucket, axis=0).transpose(0, 3, 1, 2)


def _frequencies(features: int, base: float) -> Float[np.ndarray, " half"]:
    return (1.0 / base ** (np.arange(0, features, 2, dtype=np.float32) / features)).astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def _yarn(frequencies: np.ndarray, features: int, base: float, scaling: RopeScaling) -> np.ndarray:
    def pair_with(turns: float) -> float:
        """Return the pair that turns this often over the original context (Peng et al. 2023, equation 17 ff.)."""
        period = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return features * math.log(period) / (2 * math.log(base))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, features - 1)
    divided = np.clip((np.arange(features // 2) - low) / ((high - low) or 0.001), 0, 1)
    return (divided * frequencies / scaling.factor + (1 - divided) * frequencies).astype(np.float32)


def _yarn_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0
