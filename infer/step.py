"""The jitted pair: `prefill` takes prompts (or chunks of them) in, `decode_step` takes one token a row.

Both donate their cache: copy it (`jax.tree.map(jnp.copy, cache)`) before a call to branch from it.

Where parameters lie over a mesh, call both, and `init_cache` before them, under `model.sharding.under_mesh_of(params)`:
rows and heads then stay split as the cache is.
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
    """Append a chunk of every row at `cache.lengths`: float32 logits after each row's last token, and the cache.

    tokens: right-padded; lengths: how many are real (0 leaves a row as it is; its logits mean nothing then). A row
    that would run past the capacity gets NaN logits and nothing is written past the end. encoder_tokens: what an
    encoder-decoder reads, right-padded, with the first chunk only; the cache keeps what the decoder needs of it.
    fresh: the cache is known to be empty, and is not looked at. edits: as `model.forward` takes them, of this chunk's
    activations, but not of "attention". Raises InputError where encoder tokens do not fit the cache or edits the chunk.
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
    """Append one token to every row: float32 logits of the next one, and the cache.

    A row that is full gets NaN logits and nothing is written. edits: as in `prefill`, of one token.
    """
    hidden, cache = forward_cached(
        config, params, token[:, None], jnp.ones_like(token), cache, edits=edits, execution=execution
    )
    return head(config, params, hidden), cache
