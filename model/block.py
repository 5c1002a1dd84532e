"""One Block: what training, prefill and decode all run, layer after layer."""

import flax.linen as nn
from jaxtyping import Array, Float

from model.attention import Attention, Context
from model.cache import LayerCache
from model.config import ModelConfig
from model.dropout import Dropout
from model.feedforward import FeedForward
from model.norm import Normalize


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: LayerCache | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache | None, Float[Array, "batch heads seq key"]]:
        """The residual stream after this layer, its cache, and its attention weights."""
        config = self.config
        normed = Normalize(config, name="attention_norm")(x)
        mixed, cache, weights = Attention(config, name="attention")(normed, context, cache, dropout and dropout.at(0))
        x = x + (mixed if dropout is None else dropout.at(1)(mixed))
        changed = FeedForward(config, name="feed_forward")(Normalize(config, name="feed_forward_norm")(x))
        x = x + (changed if dropout is None else dropout.at(2)(changed))
        return x, cache, weights
