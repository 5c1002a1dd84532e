"""One transformer block, which training, prefill and decode all run."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from model.attention import Attention, CrossAttention
from model.cache import LayerCache
from model.config import ModelConfig
from model.context import Context
from model.dropout import Dropout
from model.feedforward import FeedForward
from model.latent import LatentAttention
from model.layout import LayerKind
from model.moe import ExpertFeedForward
from model.norm import Normalize
from model.parameterization import output_multiplier
from model.sharding import constrain
from model.taps import NO_TAPS, Taps


class Block(nn.Module):
    """Attention, cross-attention where there is an encoder, and feed-forward, each a branch of the residual stream.

    By `norm_placement` a branch f changes the stream x to x + f(norm(x)) ("pre"), norm(x + f(x)) ("post", as in the
    original transformer) or x + norm(f(norm(x))) ("sandwich", as in Gemma 2).
    """

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: LayerCache | None = None,
        dropout: Dropout | None = None,
        taps: Taps = NO_TAPS,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache | None, dict]:
        """Return the residual stream after this layer, the layer's cache, and the report of its experts.

        dropout: places 0 … 4 of the layer have masks of their own.
        """
        config = self.config
        cached = {} if cache is None else dict(cache)
        reports: dict[str, Array] = {}

        def attention(x: Array) -> Array:
            module = LatentAttention if config.latent is not None else Attention
            y, entry = module(config, name="attention")(x, context, cached.get("self"), dropout and dropout.at(0), taps)
            if entry is not None:
                cached["self"] = entry
            return y

        def cross_attention(x: Array) -> Array:
            module = CrossAttention(config, name="cross_attention")
            y, entry = module(x, context, cached.get("cross"), dropout and dropout.at(3))
            if entry is not None:
                cached["cross"] = entry
            return y

        def feed_forward(x: Array) -> Array:
            if not self.kind.experts:
                return FeedForward(config, name="feed_forward")(x)
            y, report = ExpertFeedForward(config, cache is not None, name="feed_forward")(x, context.real)
            reports.update(report)
            return y

        x = self._add_branch("attention", attention, x, dropout and dropout.at(1), taps)
        if self.kind.cross:
            x = self._add_branch("cross_attention", cross_attention, x, dropout and dropout.at(4), taps)
        x = self._add_branch("feed_forward", feed_forward, x, dropout and dropout.at(2), taps)
        return x, None if cache is None else cached, reports

    def _add_branch(
        self, name: str, branch: Callable[[Array], Array], x: Array, dropout: Dropout | None, taps: Taps
    ) -> Array:
        config, placement = self.config, self.config.norm_placement
        y = x if placement == "post" else Normalize(config, name=f"{name}_norm")(x)
        y = branch(y)
        if placement == "sandwich":
            y = Normalize(config, name=f"{name}_post_norm")(y)
        y = y if dropout is None else dropout(y)
        multiplier = output_multiplier(config, "residual")
        x = x + taps(f"{name}_output", y if multiplier == 1 else multiplier * y)
        x = constrain(x, "batch", "sequence", None)
        return Normalize(config, name=f"{name}_norm")(x) if placement == "post" else x
