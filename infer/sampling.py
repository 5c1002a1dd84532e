"""How the next token is chosen. All settings are traced: changing one compiles nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy. top_k: keep the k likeliest; 0: all. top_p: keep the smallest set with at least this
    probability (Holtzman et al. 2020), after top_k. stop_ids: None means the config's `eos_token_ids`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} must not be negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token")


GREEDY = Sampling(temperature=0.0)


@struct.dataclass
class SamplerState:
    """The traced settings and the key; the key of a step is folded from it."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    key: PRNGKeyArray

    @classmethod
    def create(cls, sampling: Sampling, key: PRNGKeyArray) -> "SamplerState":
        """Strongly typed scalars of the settings."""
        return cls(
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.int32(sampling.top_k),
            top_p=jnp.float32(sampling.top_p),
            key=key,
        )


def choose(
    state: SamplerState, logits: Float[Array, "batch vocab"], step: Int[Array, ""]
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """(token, its log-probability under the model, before temperature and truncation) for every row."""
    sample = functools.partial(_sample, state, jax.random.fold_in(state.key, step))
    greedy = lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jax.lax.cond(state.temperature > 0, sample, greedy, logits)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def truncate(state: SamplerState, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """Logits over the temperature, with −inf where top-k or top-p leaves a token out."""
    vocab = logits.shape[-1]
    logits = logits / jnp.maximum(state.temperature, 1e-6)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    k = jnp.where(state.top_k > 0, state.top_k, vocab)
    ranked = jnp.where(jnp.arange(vocab)[None] < k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # A token stays while what is likelier than it does not fill top_p yet; so the likeliest always stays.
    ranked = jnp.where((before < state.top_p) | (state.top_p >= 1), ranked, -jnp.inf)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.full_like(logits, -jnp.inf).at[rows, order].set(ranked)


def _sample(state: SamplerState, key: PRNGKeyArray, logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    return jax.random.categorical(key, truncate(state, logits), axis=-1).astype(jnp.int32)
