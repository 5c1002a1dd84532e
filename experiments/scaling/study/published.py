"""Provide published optima, learning rates, batch sizes and shapes, for plans without an own study."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from experiments.scaling.study.family import ModelFamily
from model import ModelConfig
from model.errors import InputError

AT_SCALE = 1e17
"""FLOPs of the middle budget from which on a definition's gaps are filled by `defaults_at_scale`."""
DEFAULT_LAW = "besiroglu"
_FINE = 8  # smallest width, in steps: neighbouring sizes then differ by about one step or more


@dataclasses.dataclass(frozen=True)
class PublishedLaw:
    """N* = params · (C / flops)^exponent at a budget of C = 6·N·D FLOPs; N counts every parameter."""

    source: str
    flops: float
    params: float
    exponent: float
    fitted: tuple[float, float] = (6e18, 3e21)
    """The budgets that it was fitted to."""

    def optimum(self, budget: float) -> float:
        """Return N* at a budget of FLOPs."""
        return self.params * (budget / self.flops) ** self.exponent

    def tokens_per_parameter(self, budget: float) -> float:
        """Return D*/N* at a budget of FLOPs."""
        return budget / (6 * self.optimum(budget) ** 2)


def _from_loss(source: str, A: float, B: float, alpha: float, beta: float) -> PublishedLaw:
    """Return the optimum of L = E + A·N^-alpha + B·D^-beta, in closed form (Hoffmann et al. 2022, equation 4)."""
    return PublishedLaw(source, 6.0, (alpha * A / (beta * B)) ** (1 / (alpha + beta)), beta / (alpha + beta))


LAWS = {
    "hoffmann-1": PublishedLaw("Hoffmann et al. 2022, approach 1 (tables 2 and 3)", 1.21e20, 1e9, 0.50),
    "hoffmann-2": PublishedLaw("Hoffmann et al. 2022, approach 2 (tables 2 and A3)", 1.20e20, 1e9, 0.49),
    # The paper prints rounded exponents, which miss its own table A3 by a fifth; these are of its source.
    "hoffmann-3": _from_loss("Hoffmann et al. 2022, approach 3", 406.4, 410.7, 0.3392, 0.2849),
    "besiroglu": _from_loss("Besiroglu et al. 2024, approach 3 fitted again", 482.01, 2085.43, 0.3478, 0.3658),
}
"""Laws by the names that `--law` takes."""


def law_named(name: str) -> PublishedLaw:
    """Return a published law by name. Raises InputError, listing the known ones, for other names."""
    if name not in LAWS:
        raise InputError(f"there is no published law {name!r}; known are {', '.join(LAWS)}")
    return LAWS[name]


def defaults_at_scale(given: dict[str, Any], base: ModelConfig) -> dict[str, Any]:
    """Return defaults for the keys of a design that are not in `given`, from published models (≥ 1e17 FLOPs).

    law: DEFAULT_LAW. family: its published depth; heads of the base's size, at least 64; feed-forwards in multiples of
    128; widths in multiples of whole groups of heads, if these steps are fine enough.
    seq_len: 2048. batch_size, learning_rate: the power laws of DeepSeek-AI 2024 (DeepSeek LLM, equation 1).
    """
    found: dict[str, Any] = {"seq_len": 2048}
    if not {"tokens_per_parameter", "optimum_exponent"} & given.keys():
        found["law"] = DEFAULT_LAW
    seq_len = given.get("seq_len", found["seq_len"])
    found["batch_size"] = _power(0.2920, 0.3271, 1 / seq_len)
    found["learning_rate"] = _power(0.3118, -0.1250)
    if given.get("branches"):  # runs of one size share a base run, so neither may depend on the FLOPs of a single run
        middle = middle_of(given["budgets"]) if given.get("budgets") else 1e20
        found["batch_size"] = 2 ** max(0, round(math.log2(_at(found["batch_size"], middle))))
        found["learning_rate"] = _at(found["learning_rate"], middle)
    return {name: value for name, value in found.items() if name not in given} | {
        "family": _family(given.get("family", {}), base, given.get("budgets", ()))
    }


def middle_of(budgets: Sequence[float]) -> float:
    """Return the geometric mean of the smallest and the largest budget."""
    return math.sqrt(budgets[0] * budgets[-1])


def _family(given: dict[str, Any], base: ModelConfig, budgets: Sequence[float]) -> dict[str, Any]:
    own = base.head_dim if base.latent is None else base.d_model // base.num_heads
    head_dim = max(64, own)
    usual = ModelFamily(depth="base" if "aspect_ratio" in given else "published", head_dim=head_dim, ff_multiple=128)
    together = head_dim * base.num_heads // base.num_kv_heads  # the step in width that keeps the base's groups whole
    if budgets and together <= usual.nearest(base, LAWS[DEFAULT_LAW].optimum(budgets[0])) / _FINE:
        usual = usual.replace(width_multiple=together)
    return usual.to_dict() | given


_CENTRE = 1e20


def _power(coefficient: float, exponent: float, unit: float = 1.0) -> dict[str, Any]:
    """Return coefficient · C^exponent, in a unit, as the table of a law in a design."""
    value = coefficient * _CENTRE**exponent * unit
    return {"value": value, "centre": {"flops": _CENTRE}, "exponents": {"flops": exponent}}


def _at(law: dict[str, Any], flops: float) -> float:
    return law["value"] * (flops / law["centre"]["flops"]) ** law["exponents"]["flops"]
