"""The jitted pair: `prefill` appends prompts, or chunks of them, to a cache; `decode_step` appends one token per row.

Both donate their cache: copy it (`jax.tree.map(jnp.copy, cache)`) before a call to branch from it.

With parameters sharded over a mesh, call `init_cache`, `prefill` and `decode_step` under
`model.sharding.under_mesh_of(params)`: rows and heads then stay split as they are in the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model import Execution, KVCache, ModelConfig, Params, head
from model.ambient import lenient
from model.taps import Edits
from model.transformer import forward_cached


@functools.partial(jax.jit, static_argnums=0, static_argnames=("fresh", "execution"), donate_argnums=4)
@lenient()
def prefill(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    cache: KVCache,
    *,
    encoder_tokens: Int[Array, "batch source"] | None = None,
    encoder_lengths: Int[Array, " batch"] | None = None,
    fresh: bool = False,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Append a chunk to every row at `cache.lengths`; return float32 logits after each row's last token, and the cache.

    tokens: right-padded. lengths: real tokens of each row; 0 leaves a row unchanged, and its logits are undefined. A
    row whose chunk exceeds the capacity gets NaN logits, and nothing is written past the end.
    encoder_tokens: right-padded input of an encoder-decoder's encoder, with the first chunk only; the cache keeps what
    cross-attention needs. fresh: promises that the cache is empty, so that it is not read. edits: as in
    `model.forward`, of this chunk's activations, except those named "attention".
    Raises InputError if the encoder tokens do not fit the cache or the edits do not fit the chunk.
    """
    hidden, cache = forward_cached(
        config,
        params,
        tokens,
        lengths,
        cache,
        encoder_tokens,
        encoder_lengths,
        fresh=fresh,
        edits=edits,
        execution=execution,
    )
    return head(config, params, hidden), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution", donate_argnums=3)
@lenient()
def decode_step(
    config: ModelConfig,
    params: Params,
    token: Int[Array, " batch"],
    cache: KVCache,
    *,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Append one token to every row; return float32 logits of the next token, and the cache.

    A full row gets NaN logits, and nothing is written. edits: as in `prefill`, of one token.
    """
    hidden, cache = forward_cached(
        config, params, token[:, None], jnp.ones_like(token), cache, edits=edits, execution=execution
    )
    return head(config, params, hidden), cache
