"""The ladder: which sizes to train on how many tokens, so that every budget's valley has two walls."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from model import ModelConfig, accounting, presets
from model.errors import InputError

# Where the optimum is expected before anything is known. Hoffmann et al. 2022 find 20 for large models; the study's
# small ones, whose N is mostly embedding table, have it near 8 on English prose (docs/LOG.md).
TOKENS_PER_PARAMETER = 8
SIZE_STEPS = (-2, -1, 0, 1, 2)  # sizes per budget, in factors of SIZE_FACTOR around the expected optimum
SIZE_FACTOR = 1.5
BUDGET_FACTOR = 2.25  # = SIZE_FACTOR², so that neighbouring budgets share four of their five shapes
HELD_OUT_FACTOR = 3.0  # compute of the held-out run over the largest budget of the fit


@dataclasses.dataclass(frozen=True)
class Rung:
    """One run to come. params: N, with the embedding table (once). tokens: D. flops: 6·N·D of what is really run."""

    d_model: int
    params: int
    steps: int
    tokens: int
    flops: float
    budget: float
    epochs: float
    learning_rate: float
    warmup_steps: int

    @property
    def repeated(self) -> bool:
        """Whether the run sees some tokens more than once; such a run does not enter a fit."""
        return self.epochs > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"repeated": self.repeated}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all rungs share, and the transfer rule: learning rate ∝ 1 / d_model from the proxy's best (muP's rule for
    Adam, Yang et al. 2022; measured in docs/LOG.md), the same batch, warm-up over 5 % of the steps.
    """

    vocab_size: int
    batch_size: int
    seq_len: int
    tokens_per_epoch: int
    proxy_d_model: int
    proxy_learning_rate: float

    RULE = "learning rate = {rate:.3g} · {width} / d_model; batch and betas as in the sweep; warm-up 5 % of the steps"

    @property
    def rule(self) -> str:
        """The transfer rule in words."""
        return self.RULE.format(rate=self.proxy_learning_rate, width=self.proxy_d_model)

    def config(self, d_model: int) -> ModelConfig:
        """The family's member of that width."""
        return presets.study_family(d_model, vocab_size=self.vocab_size, max_seq_len=self.seq_len)

    def rung(self, d_model: int, budget: float) -> Rung:
        """The run of that width which spends `budget` = 6·N·D FLOPs, to the nearest whole step."""
        params = accounting.parameters(self.config(d_model)).total
        per_step = self.batch_size * self.seq_len
        steps = max(1, round(budget / (6 * params * per_step)))
        return Rung(
            d_model=d_model,
            params=params,
            steps=steps,
            tokens=steps * per_step,
            flops=6.0 * params * steps * per_step,
            budget=budget,
            epochs=steps * per_step / self.tokens_per_epoch,
            learning_rate=self.proxy_learning_rate * self.proxy_d_model / d_model,
            warmup_steps=max(1, round(0.05 * steps)),
        )

    def width_nearest(self, params: float) -> int:
        """The width of the family whose parameter count is nearest to `params`, in ratio."""
        widths = [*range(4, 128, 4), *range(128, 256, 16), *range(256, 2049, 64)]
        count = lambda width: accounting.parameters(self.config(width)).total
        return min(widths, key=lambda width: abs(math.log(count(width) / params)))


def expected_optimum(budget: float) -> float:
    """N* before anything is known: D = 8·N and C = 6·N·D."""
    return math.sqrt(budget / (6 * TOKENS_PER_PARAMETER))


def budgets_from(smallest: float, count: int = 4) -> list[float]:
    """`count` budgets, each BUDGET_FACTOR times the one before."""
    return [smallest * BUDGET_FACTOR**i for i in range(count)]


def plan_ladder(recipe: Recipe, budgets: Sequence[float]) -> list[Rung]:
    """Five sizes per budget around the expected optimum; raises InputError where they would not be distinct."""
    rungs = []
    for budget in budgets:
        widths = sorted({recipe.width_nearest(expected_optimum(budget) * SIZE_FACTOR**step) for step in SIZE_STEPS})
        if len(widths) < 4:
            raise InputError(
                f"a budget of {budget:.2g} FLOPs is too small: its valley would have {len(widths)} distinct sizes; "
                "give a larger budget (or more minutes), or a smaller vocabulary"
            )
        rungs += [recipe.rung(width, budget) for width in widths]
    return rungs


def held_out_rung(recipe: Recipe, rungs: Sequence[Rung], optimal_params: float) -> Rung:
    """A run of HELD_OUT_FACTOR times the compute of any rung, at the size that the fit calls optimal there."""
    largest = max(rung.flops for rung in rungs)
    width = recipe.width_nearest(optimal_params)
    rung = recipe.rung(width, HELD_OUT_FACTOR * largest)
    while rung.flops < HELD_OUT_FACTOR * largest:  # whole steps may round it just below
        rung = recipe.rung(width, rung.budget + 6 * rung.params * recipe.batch_size * recipe.seq_len)
    return rung


def largest_smallest_budget(seconds_of: Callable[[float], float], seconds: float) -> float:
    """The smallest budget whose whole study takes at most `seconds`, by bisection; `seconds_of` must grow."""
    low, high = 1e9, 1e20
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if seconds_of(middle) <= seconds else (low, middle)
    return low
