"""Log-probabilities of the answers in a batch of rows, as preference losses need them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model import InputError, ModelConfig, Params, head


def summed_log_probs(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "rows seq d_model"],
    tokens: Int[Array, "rows seq"],
    masks: Float[Array, "masks rows seq"],
    chunks: int = 1,
    squares: Float[Array, "squares rows seq"] | None = None,
) -> Float[Array, "sums rows"]:
    """Return Σ mask · log p(token | the tokens before it) of every row, for several masks at once, in float32.

    masks: the weight of each *token*, at least 0; the first token of a row, which nothing predicts, never counts.
    chunks: pieces of the sequence, of which only one has its logits in memory. squares: more masks, whose sums of
    log Σ p² over the vocabulary follow those of `masks`, without a gradient. Raises InputError where chunks do not
    divide the sequence.

    Example: a row [5, 7, 9] with the mask [0, 1, 1] gives log p(7 | 5) + log p(9 | 5, 7).
    """
    # The logits at position t predict the token at t + 1; those of the last position predict nothing.
    targets = jnp.roll(tokens, -1, axis=1)
    count = len(masks)
    masks = masks if squares is None else jnp.concatenate([masks, squares])
    masks = jnp.roll(masks, -1, axis=2).at[:, :, -1].set(0)

    def of_piece(
        hidden: Float[Array, "rows piece d_model"],
        targets: Int[Array, "rows piece"],
        masks: Float[Array, "sums rows piece"],
    ) -> Float[Array, "sums rows"]:
        logits = head(config, params, hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        log_p = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_z
        sums = masked_sums(masks[:count], log_p)
        if squares is None:
            return sums
        log_squares = jax.nn.logsumexp(2 * jax.lax.stop_gradient(logits), axis=-1) - 2 * jax.lax.stop_gradient(log_z)
        return jnp.concatenate([sums, masked_sums(masks[count:], log_squares)])

    def masked_sums(
        masks: Float[Array, "some rows piece"], values: Float[Array, "rows piece"]
    ) -> Float[Array, "some rows"]:
        return jnp.sum(jnp.where(masks > 0, masks * values, 0), axis=-1)

    if chunks == 1:
        return of_piece(hidden, targets, masks)
    rows, seq = tokens.shape
    if seq % chunks:
        raise InputError(f"loss_chunks={chunks} does not divide the batch's {seq} tokens in a row")

    # Piece k of n takes tokens k, k + n, …: as evenly spread over a sequence axis as the whole row.
    pieces = (
        jnp.moveaxis(hidden.reshape(rows, -1, chunks, hidden.shape[-1]), 2, 0),
        jnp.moveaxis(targets.reshape(rows, -1, chunks), 2, 0),
        jnp.moveaxis(masks.reshape(len(masks), rows, -1, chunks), 3, 0),
    )

    def add(total: Float[Array, "sums rows"], piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(of_piece)(*piece), None

    return jax.lax.scan(add, jnp.zeros(masks.shape[:2], jnp.float32), pieces)[0]
