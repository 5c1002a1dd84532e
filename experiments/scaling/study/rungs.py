"""Plan the ladder of a design: sizes, tokens, and which runs branch off which base run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from experiments.scaling.rows.conventions import count
from experiments.scaling.study.design import Design, Law
from experiments.scaling.study.published import middle_of
from experiments.words import counted
from model import ModelConfig
from model.errors import InputError
from train.overlay import overlay
from train.recipe import Recipe

_WALL = 0.75  # in steps of the size factor: least distance of the outermost sizes from the expected optimum
_LEAST_STEPS = 4
_LARGEST = 1e32  # FLOPs; larger budgets are beyond any computer

_COLUMNS: tuple[str, ...] = ("name", "budget", "budget_flops", "held_out")
_COLUMNS += ("params", "params_total", "params_non_embedding", "params_without_head")
_COLUMNS += ("batch_size", "seq_len", "steps", "tokens", "flops_6nd", "flops_exact", "flops_without_attention")
_COLUMNS += ("epochs", "learning_rate", "warmup_steps", "decay_steps", "seed", "trunk", "leave_step", "seconds")
_COLUMNS += ("repeated",)

StepSeconds = Callable[[ModelConfig, int], float]
"""(config, batch size) → seconds of one training step of one run."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """One planned run: a recipe, without its data, and its place in the ladder.

    budget: index, from 0 for the smallest; budget_flops: its planned cost. overrides: the fields of its shape. params:
    N: active parameters, the embedding table counted once; params_total for a dense model. The other params and, of the
    whole run, flops_exact and flops_without_attention: as in `conventions`. flops_6nd: 6·N·D of the whole steps that
    are run. epochs: over the data's tokens; None: there are no data yet. trunk: the name of the base run that it
    branches off after leave_step updates; None: it starts fresh. seconds: predicted for the steps that this run trains
    itself; None: not timed.
    """

    name: str
    budget: int
    budget_flops: float
    held_out: bool
    recipe: Recipe
    overrides: dict[str, Any]
    params: int
    params_total: int
    params_non_embedding: int
    params_without_head: int
    tokens: int
    flops_6nd: float
    flops_exact: float
    flops_without_attention: float
    epochs: float | None
    trunk: str | None = None
    leave_step: int = 0
    seconds: float | None = None

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.recipe.model

    @property
    def d_model(self) -> int:
        """The model's width."""
        return self.config.d_model

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return self.recipe.train.batch_size

    @property
    def seq_len(self) -> int:
        """Tokens per row."""
        return self.recipe.train.seq_len

    @property
    def steps(self) -> int:
        """Updates to its end, those of its base run included."""
        return self.recipe.horizon

    @property
    def warmup_steps(self) -> int:
        """Updates of the warm-up."""
        return int(self.recipe.hparams.warmup_steps)

    @property
    def decay_steps(self) -> int:
        """Updates of the decay phase under "wsd", else 0."""
        return int(self.recipe.hparams.decay_steps)

    @property
    def learning_rate(self) -> float:
        """The schedule's peak."""
        return self.recipe.hparams.to_dict()["learning_rate"]

    @property
    def seed(self) -> int:
        """The seed of parameters and of the data's order."""
        return int(self.recipe.hparams.seed)

    @property
    def repeated(self) -> bool:
        """Whether it sees some tokens more than once."""
        return self.epochs is not None and self.epochs > 1

    @property
    def share_trained(self) -> float:
        """Return the share of its steps that are not those of its base run."""
        return 1 - self.leave_step / self.steps

    @property
    def point(self) -> dict[str, Any]:
        """The fields in which it differs from its design's base, by the names that a sweep varies."""
        own = ("batch_size", "steps", "learning_rate", "warmup_steps", "decay_steps", "seed")
        return {**self.overrides, **{name: getattr(self, name) for name in own}}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, one level deep; `conventions.read_counts` reads its columns."""
        return {**{name: getattr(self, name) for name in _COLUMNS}, **self.overrides}


def plan_rungs(
    design: Design,
    vocabulary: int,
    tokens_per_epoch: int | None,
    seconds_of: StepSeconds | None = None,
    compile_seconds: float = 0.0,
) -> list[Rung]:
    """Return every run of the study, by budget, then by size, then by seed.

    Sizes are taken from one series, `size_factor` apart, through the optimum expected at the middle budget: each budget
    takes those around its own optimum. So budgets share shapes; neighbours differ in one of them where budget_factor =
    size_factor^(1 / optimum_exponent).

    With branches, the fitted runs of one shape and seed share a base run: the one of most tokens, whose own cooldown is
    its end. The others leave it where their last `decay_fraction` begins; the warm-up of all is by the shortest of
    them. Held-out runs neither branch off nor are branched off: nothing of them is trained before they are predicted.

    Raises InputError if a budget is too small for sizes on both sides of its optimum, or if hours are given and no
    `seconds_of`, or too few.
    """
    base = design.base_config(vocabulary)
    _check_fields(design, base)

    def lay_out(given: Design) -> list[Rung]:
        return _lay_out(given, base, tokens_per_epoch, seconds_of)

    if not design.hours:
        return lay_out(design)
    if seconds_of is None:
        raise InputError(f"hours={design.hours:g} needs the time of a step on this machine; probe it, or give budgets")

    def sized(smallest: float) -> Design:
        return design.with_budgets(tuple(smallest * design.budget_factor**i for i in range(design.count)))

    def seconds(smallest: float) -> float:
        try:
            rungs = lay_out(sized(smallest))
        except InputError:
            return 0.0  # too small for a ladder, and so cheap enough
        return sum(rung.seconds or 0.0 for rung in rungs) + compile_seconds * len(shapes(rungs))

    try:
        return lay_out(sized(_largest(seconds, 3600 * design.hours)))
    except InputError as error:
        raise InputError(f"hours={design.hours:g} are too few on this machine: {error}") from error


def shapes(rungs: Sequence[Rung]) -> dict[tuple[ModelConfig, int], list[Rung]]:
    """Return the rungs by static shape, (config, batch size): each is compiled once."""
    found: dict[tuple[ModelConfig, int], list[Rung]] = {}
    for rung in rungs:
        found.setdefault((rung.config, rung.batch_size), []).append(rung)
    return found


def expected_optimum(design: Design, budget: float) -> float:
    """Return N* at a budget of FLOPs, as a design with budgets expects it."""
    middle = middle_of(design.budgets)
    return math.sqrt(middle / (6 * design.tokens_per_parameter)) * (budget / middle) ** design.optimum_exponent


def _largest(seconds_of: Callable[[float], float], seconds: float) -> float:
    """Return the largest budget that takes at most `seconds`, by bisection; `seconds_of` must grow."""
    low, high = 1e9, 1e20
    while 0 < seconds_of(high) <= seconds and high < _LARGEST:
        low, high = high, 1e3 * high
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if seconds_of(middle) <= seconds else (low, middle)
    return low


def _lay_out(
    design: Design, base: ModelConfig, tokens_per_epoch: int | None, seconds_of: StepSeconds | None
) -> list[Rung]:
    counts: dict[int, dict[str, float]] = {}
    rungs = []
    for index, budget in enumerate(design.budgets):
        for width in _widths(design, base, budget):
            if width not in counts:
                member = design.family.member(base, width)
                counts[width] = count(member, design.seq_len, design.objective_of(member))
            rungs.append(_rung(design, base, index, width, counts[width], tokens_per_epoch))
    if design.branches:
        rungs = _branch_off(design, rungs)
    if seconds_of is not None:
        rungs = [_timed(design, rung, seconds_of) for rung in rungs]
    return [_seeded(rung, design, seed) for rung in rungs for seed in range(design.seed, design.seed + design.seeds)]


def _widths(design: Design, base: ModelConfig, budget: float) -> list[int]:
    """Return a budget's widths: consecutive members of the series, centred on the optimum."""
    family, factor = design.family, math.log(design.size_factor)
    origin, optimum = expected_optimum(design, middle_of(design.budgets)), expected_optimum(design, budget)
    # All distances are in steps of the size factor: first the series' members around the optimum, …
    centre, reach = round(math.log(optimum / origin) / factor), 2 * design.sizes
    steps = range(centre - reach, centre + reach + 1)
    series = list(dict.fromkeys(family.nearest(base, origin * math.exp(factor * step)) for step in steps))
    # … then the window of them whose mean distance from the optimum is smallest.
    distances = [math.log(family.params(base, width) / optimum) / factor for width in series]
    starts = range(len(series) - design.sizes + 1)
    start = min(starts, key=lambda i: abs(sum(distances[i : i + design.sizes])), default=0)
    chosen = slice(start, start + design.sizes)
    if len(series) < design.sizes or distances[chosen][0] > -_WALL or distances[chosen][-1] < _WALL:
        raise InputError(
            f"a budget of {budget:.3g} FLOPs is too small: its optimum is expected at {optimum:,.0f} parameters, and "
            f"the family's sizes near it begin at {family.params(base, series[start]):,}, so that its "
            "valley would have too few sizes on one side; give a larger budget (or more hours), a smaller vocabulary, "
            "or a finer step of widths"
        )
    return series[chosen]


def _rung(
    design: Design, base: ModelConfig, index: int, width: int, counts: dict[str, float], tokens_per_epoch: int | None
) -> Rung:
    config, budget, params = design.family.member(base, width), design.budgets[index], design.family.params(base, width)
    sizes = {"d_model": width, "params": params, "tokens": budget / (6 * params), "flops": budget}
    batch_size = _batch_size(design, sizes)
    per_step = batch_size * design.seq_len
    steps = round(budget / (6 * params * per_step))
    if steps < _LEAST_STEPS:
        raise InputError(
            f"a budget of {budget:.3g} FLOPs is too small: it is {counted(steps, 'step')} of "
            f"{per_step} tokens for a model of "
            f"{params:,} parameters; give a larger budget (or more hours), or smaller batches"
        )
    tokens = steps * per_step
    return Rung(
        name=f"b{index + 1}-d{width}",
        budget=index,
        budget_flops=budget,
        held_out=index >= len(design.budgets) - design.held_out,
        recipe=design.recipe(
            config,
            batch_size,
            steps,
            learning_rate=_learning_rate(design, sizes),
            warmup_steps=_warmup(design, steps),
            decay_steps=max(1, round(design.decay_fraction * steps)) if design.run_schedule == "wsd" else 0,
        ),
        overrides=design.family.overrides(base, width),
        params=params,
        params_total=int(counts["params_total"]),
        params_non_embedding=int(counts["params_non_embedding"]),
        params_without_head=int(counts["params_without_head"]),
        tokens=tokens,
        flops_6nd=6.0 * params * tokens,
        flops_exact=counts["flops_exact"] * tokens,
        flops_without_attention=counts["flops_without_attention"] * tokens,
        epochs=None if tokens_per_epoch is None else tokens / tokens_per_epoch,
    )


def _with_hparams(rung: Rung, **hparams: Any) -> Rung:
    """Return the rung with some hyperparameters changed."""
    recipe = rung.recipe.replace(hparams=rung.recipe.hparams.replace(**hparams))
    return dataclasses.replace(rung, recipe=recipe)


def _branch_off(design: Design, rungs: Sequence[Rung]) -> list[Rung]:
    """Let the fitted rungs of each shape branch off the longest one, which is their base run."""
    branched: dict[str, Rung] = {}
    for members in shapes([rung for rung in rungs if not rung.held_out]).values():
        trunk = max(members, key=lambda rung: rung.steps)
        warmup = _warmup(design, min(rung.steps for rung in members))
        for rung in members:
            own = _with_hparams(rung, warmup_steps=warmup)
            if rung is not trunk:
                own = dataclasses.replace(own, trunk=trunk.name, leave_step=rung.steps - rung.decay_steps)
                if own.leave_step < max(1, warmup):
                    raise InputError(
                        f"{rung.name} would leave its base run after {own.leave_step} steps, in a warm-up of {warmup}; "
                        "give smaller warmup_fraction and decay_fraction, or a larger budget"
                    )
            branched[rung.name] = own
    return [branched.get(rung.name, rung) for rung in rungs]


def _timed(design: Design, rung: Rung, seconds_of: StepSeconds) -> Rung:
    """Return the rung with the seconds of its own steps and of validation (a third of a training step each)."""
    steps = rung.steps - rung.leave_step + design.evaluate_tokens / (3 * rung.batch_size * rung.seq_len)
    return dataclasses.replace(rung, seconds=steps * seconds_of(rung.config, rung.batch_size))


def _seeded(rung: Rung, design: Design, seed: int) -> Rung:
    seeded = _with_hparams(rung, seed=seed)
    if design.seeds == 1:
        return seeded
    trunk = None if rung.trunk is None else f"{rung.trunk}-s{seed}"
    return dataclasses.replace(seeded, name=f"{rung.name}-s{seed}", trunk=trunk)


def _warmup(design: Design, steps: int) -> int:
    return max(1, round(design.warmup_fraction * steps)) if design.warmup_fraction else 0


def _learning_rate(design: Design, sizes: dict[str, float]) -> float:
    rate = design.learning_rate
    return rate.at(sizes) if isinstance(rate, Law) else rate


def _batch_size(design: Design, sizes: dict[str, float]) -> int:
    rows = design.batch_size
    return 2 ** max(0, round(math.log2(rows.at(sizes)))) if isinstance(rows, Law) else rows


def _check_fields(design: Design, base: ModelConfig) -> None:
    """Raise InputError for fields that are wrong for every rung, before the ladder is planned."""
    design.family.member(base, design.family.step(base))
    shape, objective = design.train_config(1), design.objective_of(base)
    overlay(design.shared_fields, Recipe(base, shape, objective=objective))
    objective.check(base, shape)
    objective.check_execution(shape, design.execution.replace(accumulate=1))  # a rung's batch size is not known yet
