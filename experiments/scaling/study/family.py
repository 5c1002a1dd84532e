"""Define families of models: one rule that derives the architecture from its width."""

import dataclasses
import functools
import math
from typing import Any, Literal

from model import ModelConfig, accounting
from model.errors import InputError
from model.parts import Part


@dataclasses.dataclass(frozen=True)
class ModelFamily(Part):
    """The rule that derives shapes from d_model; 0: as in the base.

    A law holds within a family that changes one thing smoothly: where small members would differ in depth by a whole
    layer, leave the depth fixed (docs/LOG.md). Query heads per key/value head, windows, experts and all else are the
    base's.
    """

    aspect_ratio: float = 0.0
    """d_model / num_layers, to the nearest whole number of layers, at least one; 0: what `depth` says."""
    depth: Literal["base", "published"] = "base"
    """base: the base's depth at every width. published: a layer per 64 features up to d_model = 1,024, per 128 from
    4,096 on, in between per 2·sqrt(d_model), as GPT-3, Chinchilla and Llama have it."""
    head_dim: int = 0
    """Features of a head, so that a wider model has more heads; 0: the base's number of heads, each of them wider."""
    ff_ratio: float = 0.0
    """d_ff / d_model; 0: the base's ratio, or the derived one where it has none."""
    ff_multiple: int = 0
    """d_ff is the nearest multiple of this, which then replaces the derived width; 0: of 4."""
    width_multiple: int = 0
    """Widths are multiples of this; 0: the smallest with heads of whole, even size."""

    def step(self, base: ModelConfig) -> int:
        """Return the distance between neighbouring widths.

        Raises InputError if heads would not divide width_multiple.
        """
        smallest = self.head_dim or 2 * base.num_heads
        if self.width_multiple % smallest:
            raise InputError(
                f"width_multiple={self.width_multiple} must be a multiple of {smallest}, "
                + ("the head_dim" if self.head_dim else f"twice the {base.num_heads} heads of the base")
            )
        return self.width_multiple or smallest

    def overrides(self, base: ModelConfig, d_model: int) -> dict[str, Any]:
        """Return the fields in which the member of that width differs from the base, derived ones left out."""
        heads = max(1, d_model // self.head_dim) if self.head_dim else base.num_heads
        found: dict[str, Any] = {
            "d_model": d_model,
            "num_layers": self._layers(base, d_model),
            "num_heads": heads,
        }
        if "num_kv_heads" not in base.derived:
            found["num_kv_heads"] = _kv_heads(base, heads)
        if self.head_dim and base.latent is None:
            found["head_dim"] = self.head_dim
        elif "head_dim" not in base.derived and base.latent is None:
            found["head_dim"] = max(2, 2 * round(base.head_dim * d_model / base.d_model / 2))
        if self.ff_ratio or self.ff_multiple or "d_ff" not in base.derived:
            found["d_ff"] = self._wide(self.ff_ratio or base.d_ff / base.d_model, d_model)
        if base.experts is not None:
            shrink = self.ff_ratio * base.d_model / base.d_ff if self.ff_ratio else 1.0
            found["experts.d_ff"] = self._wide(shrink * base.experts.d_ff / base.d_model, d_model)
            if base.experts.shared_d_ff:
                found["experts.shared_d_ff"] = self._wide(shrink * base.experts.shared_d_ff / base.d_model, d_model)
        return found

    def _layers(self, base: ModelConfig, d_model: int) -> int:
        ratio = self.aspect_ratio
        if not ratio and self.depth == "base":
            return base.num_layers
        return max(1, round(d_model / (ratio or min(max(2 * math.sqrt(d_model), 64.0), 128.0))))

    def _wide(self, ratio: float, d_model: int) -> int:
        multiple = self.ff_multiple or 4
        return max(multiple, multiple * round(ratio * d_model / multiple))

    def member(self, base: ModelConfig, d_model: int) -> ModelConfig:
        """Return the family's model of that width. Raises InputError if there is none."""
        return _member(self, base, d_model)

    def params(self, base: ModelConfig, d_model: int) -> int:
        """Return N of that width: active parameters, embedding tables included (all parameters of a dense model)."""
        return accounting.parameters(self.member(base, d_model)).active

    def nearest(self, base: ModelConfig, params: float) -> int:
        """Return the width whose N is nearest to `params`, in ratio; N must grow with the width."""
        step = self.step(base)
        low, high = 1, 2
        while self.params(base, high * step) < params:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.params(base, middle * step) < params else (low, middle)

        def off(multiple: int) -> float:
            return abs(math.log(self.params(base, multiple * step) / params))

        return step * min((low, high), key=off)


@functools.lru_cache(maxsize=4096)
def _member(family: ModelFamily, base: ModelConfig, d_model: int) -> ModelConfig:
    fields = family.overrides(base, d_model)
    inside = {name.partition(".")[2]: fields.pop(name) for name in list(fields) if "." in name}
    if inside:
        assert base.experts is not None
        fields["experts"] = base.experts.replace(**inside)
    return base.replace(**fields)


def _kv_heads(base: ModelConfig, heads: int) -> int:
    """Return the number of key/value heads by the base's share of the query heads, always a divisor of `heads`."""
    if base.num_kv_heads == 1 and base.num_heads > 1:
        return 1
    wanted = heads * base.num_kv_heads / base.num_heads
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    return min(divisors, key=lambda count: abs(math.log(count / wanted)))
