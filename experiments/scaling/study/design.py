"""Define a scaling study: what is trained, and where the optimum is expected. Stored as TOML."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from experiments.scaling.study.family import ModelFamily
from experiments.scaling.study.published import AT_SCALE, defaults_at_scale, law_named, middle_of
from experiments.words import counted
from model import Execution, ModelConfig
from model.errors import InputError, UnknownNameError, check_number
from model.execution import FIELDS as EXECUTION
from model.parts import Part
from train import TrainConfig, objectives
from train.config import Schedule
from train.objectives import Objective
from train.overlay import OBJECTIVE, overlay
from train.recipe import Recipe

_SIZES = ("d_model", "params", "tokens", "flops")
_DECIDED: tuple[str, ...] = (
    "d_model",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "vocab_size",
    "max_seq_len",
)
_DECIDED += ("batch_size", "seq_len", "schedule", "phases", "learning_rate", "total_steps", "seed")
_DECIDED += ("warmup_steps", "warmup_fraction", "decay_steps", "decay_fraction", "final_fraction")


_INSTEAD_OF = {
    "budgets": ("hours",),
    "hours": ("budgets",),
    "law": ("tokens_per_parameter", "optimum_exponent"),
}
"""Keys that a key given elsewhere takes the place of."""


@dataclasses.dataclass(frozen=True)
class Law(Part):
    """value · product over names of (x / centre)^exponent, as a sweep over sizes reports it (`size_law`).

    Names: d_model; params, N; tokens, D; flops, 6·N·D of the run.
    """

    value: float
    centre: dict[str, float]
    exponents: dict[str, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Law.value", self.value, above=0)
        for part in ("centre", "exponents"):
            given = getattr(self, part)
            if not isinstance(given, dict):
                raise InputError(f"Law.{part}={given!r} must be a table of numbers, such as {{params = 1e5}}")
            for name, number in given.items():
                if name not in _SIZES:
                    raise UnknownNameError(f"size in Law.{part}", name, _SIZES)
                check_number(f"Law.{part}.{name}", number, above=0 if part == "centre" else None)
        lacking = sorted(self.exponents.keys() ^ self.centre.keys())
        if lacking:
            raise InputError(f"a law needs both centre and exponent of a size; {lacking[0]} has one of them")

    def at(self, sizes: Mapping[str, float]) -> float:
        """Return the law's value at the given sizes."""
        return self.value * math.prod((sizes[name] / self.centre[name]) ** p for name, p in self.exponents.items())


@dataclasses.dataclass(frozen=True)
class Design(Part):
    """The definition of a scaling study; every field is a key of its TOML file, `family`, `set` and laws are tables."""

    base: str = "study-32"
    """A preset (see `isoflop model list`) or a JSON file of a model config, in the working directory or next to the
    definition; it gives all fields that sizes do not change."""
    budgets: tuple[float, ...] = ()
    """FLOPs of one run of each budget, 6·N·D with the embedding table in N once, ascending; or else"""
    hours: float = 0.0
    """hours of training on this device for all runs together: the budgets follow from the measured time of a step;"""
    count: int = 6
    """number of budgets,"""
    budget_factor: float = 2.0
    """factor from each budget to the next."""
    held_out: int = 1
    """Number of largest budgets that are not fitted but predicted before they are run."""
    sizes: int = 5
    """Models per budget, at least 4."""
    size_factor: float = 1.5
    """N of a size over N of the next smaller one; all budgets take theirs from one series."""
    law: str = ""
    """A published law (`published.LAWS`) for the expected optimum, which sets the next two fields."""
    tokens_per_parameter: float = 8.0
    """D/N where the optimum is expected, at the middle budget. 8 is what small studies of small vocabularies find."""
    optimum_exponent: float = 0.5
    """The expected optimum grows as N* ∝ C to this power; a pilot's fit may differ from 0.5."""
    family: ModelFamily = dataclasses.field(default_factory=ModelFamily)
    """The shapes of the sizes."""
    batch_size: int | Law = 2
    """Rows per step; a law of params, tokens, flops is rounded to a power of two."""
    seq_len: int = 128
    """Tokens per row."""
    learning_rate: float | Law = dataclasses.field(
        default_factory=lambda: Law(0.02, {"d_model": 32.0}, {"d_model": -1.0})
    )
    """The schedule's peak, the same for all or by a law."""
    warmup_fraction: float = 0.05
    """Of a run's steps; of the shortest run, where runs share a base run."""
    schedule: Schedule = "cosine"
    """Of runs that share nothing; with branches all are "wsd"."""
    final_fraction: float = 0.0
    """Learning rate at the end over the peak."""
    branches: bool = False
    """Train one base run per size and cool it down at every budget's tokens, instead of each run from its start."""
    decay_fraction: float = 0.2
    """Of a run's steps, for its cool-down under "wsd"."""
    seeds: int = 1
    """Runs of every rung,"""
    seed: int = 0
    """with seeds from this one on."""
    evaluate_tokens: int = 65_536
    """Of the validation split, for every run's loss."""
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of all runs, of the model, TrainConfig, HParams or Execution, such as beta2 or remat."""

    def __post_init__(self) -> None:
        _read_tables(self)
        super().__post_init__()
        self._check_values()
        self._check_budgets()
        if self.law:
            law = law_named(self.law)
            object.__setattr__(self, "optimum_exponent", law.exponent)
            if self.budgets:
                object.__setattr__(self, "tokens_per_parameter", law.tokens_per_parameter(middle_of(self.budgets)))
        for name in self.set:
            if name in _DECIDED:
                keys = difflib.get_close_matches(name, self.__dataclass_fields__, n=2, cutoff=0.6) or ["family"]
                raise InputError(f"set.{name} is not free in a design: it follows from {' and '.join(keys)}")
        for field in ("learning_rate", "batch_size") if self.branches else ():
            law = getattr(self, field)
            moving = [name for name in ("tokens", "flops") if isinstance(law, Law) and law.exponents.get(name)]
            if moving:
                raise InputError(
                    f"with branches all runs of a size leave one base run, so {field} cannot be a law of {moving[0]}; "
                    "take d_model or params"
                )

    @classmethod
    def read(cls, path: str | Path | None, *, at_scale: bool = False, **instead: Any) -> Self:
        """Return the design in a TOML file (None: an empty one), with some keys instead of the file's.

        From a middle budget of `published.AT_SCALE` on, or where at_scale is true, the keys that are left out are those
        of published models (`published.defaults_at_scale`). Raises InputError, with the path, on anything wrong.
        """
        try:
            values = {} if path is None else tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as the TOML file of a design: {error}") from None
        beside = Path(path or "").parent / str(values.get("base"))
        if beside.suffix == ".json" and beside.exists() and not Path(values["base"]).exists():
            values["base"] = str(beside)
        try:
            return cls._of_file(values, instead, at_scale)
        except InputError as error:
            raise error if path is None else InputError(f"{path}: {error}") from error

    @classmethod
    def _of_file(cls, values: dict[str, Any], instead: dict[str, Any], at_scale: bool) -> Self:
        from experiments.models import read_config

        both = {"tokens_per_parameter", "optimum_exponent"} & values.keys()
        if values.get("law") and both and "law" not in instead:
            raise InputError(f"law and {min(both)} both define the expected optimum; give one")
        for name, others in _INSTEAD_OF.items():
            if name in instead:
                values = {key: value for key, value in values.items() if key not in others}
        values = values | instead
        budgets = values.get("budgets")
        if (
            isinstance(budgets, (list, tuple)) and len(budgets) == 1
        ):  # with one budget nothing is left to fit if it is held out
            values = {"held_out": 0} | values
        plain = cls.from_dict(values)  # first, so that errors refer to what the user wrote
        if not at_scale and not (plain.budgets and middle_of(plain.budgets) >= AT_SCALE):
            return plain
        values = {"base": "llama2-7b"} | values
        return cls.from_dict(values | defaults_at_scale(values, read_config(values["base"])))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output; what is not there has its default. Raises InputError on an unknown key."""
        for name in values:
            if name not in cls.__dataclass_fields__:
                raise UnknownNameError("key of a design", name, cls.__dataclass_fields__)
        return cls(**values)

    def with_budgets(self, budgets: tuple[float, ...]) -> Self:
        """Return the same study of these budgets, in place of hours."""
        return self.replace(budgets=budgets, hours=0.0)

    def differences(self, there: "Design") -> str:
        """Return the fields in which another design differs, in words; empty if none does.

        A base in a file is not compared by its path: the study's sweeps compare what it holds. How the runs are
        executed may change.
        """
        one, other = self.to_dict(), there.to_dict()
        for design in (one, other):
            design["set"] = {name: value for name, value in design["set"].items() if name not in EXECUTION}
        if one["base"].endswith(".json") and other["base"].endswith(".json"):
            one["base"] = other["base"]
        return ", ".join(f"{name}={other[name]} there, {one[name]} here" for name in one if one[name] != other[name])

    def base_config(self, vocab_size: int) -> ModelConfig:
        """Return the base with the data's vocabulary and the design's rows. Raises InputError."""
        from experiments.models import read_config

        config = read_config(self.base).replace(vocab_size=vocab_size, max_seq_len=self.seq_len, eos_token_ids=())
        return self._overlay(config, TrainConfig())[0].model

    def train_config(self, batch_size: int) -> TrainConfig:
        """Return the TrainConfig of a rung with this batch size. Raises InputError."""
        from experiments.models import read_config

        shape = TrainConfig(batch_size=batch_size, seq_len=self.seq_len, schedule=self.run_schedule)
        return self._overlay(read_config(self.base), shape)[0].train

    def recipe(self, config: ModelConfig, batch_size: int, steps: int, **hparams: float) -> Recipe:
        """Return the recipe of a rung of this model, without its data. hparams: its own. Raises InputError."""
        shape = TrainConfig(batch_size=batch_size, seq_len=self.seq_len)
        # A rung's warm-up is given in steps; 0 steps mean none.
        own = {"warmup_fraction": 0.0} if not hparams.get("warmup_steps") else {}
        fields = self.shared_fields | own | hparams
        return overlay(fields, Recipe(config, shape, steps=steps, objective=self.objective_of(config)))[0]

    def objective_of(self, config: ModelConfig) -> Objective:
        """Return the objective that trains a rung of this model, which `base_config` gave its ids.

        Raises InputError.
        """
        named = objectives.get(str(self.set.get(OBJECTIVE, objectives.LanguageModeling.NAME))).resolved(config)
        inside = {name: value for name, value in self.set.items() if name.startswith(f"{OBJECTIVE}.")}
        return overlay(inside, Recipe(config, objective=named))[0].objective

    @property
    def execution(self) -> Execution:
        """The execution of all runs."""
        from experiments.models import read_config

        return self._overlay(read_config(self.base), TrainConfig(seq_len=self.seq_len))[1]

    @property
    def run_schedule(self) -> Schedule:
        """The schedule of every run."""
        return "wsd" if self.branches else self.schedule

    @property
    def shared_fields(self) -> dict[str, Any]:
        """The fields that all runs share besides the base model and the batch's shape: the base of their sweep."""
        return {"schedule": self.run_schedule, "final_fraction": self.final_fraction, **self.set}

    def _overlay(self, config: ModelConfig, train_config: TrainConfig) -> tuple[Recipe, Execution]:
        return overlay(self.set, Recipe(config, train_config))

    def _check_values(self) -> None:
        least = {"count": 2, "sizes": 4, "seq_len": 1, "seeds": 1, "evaluate_tokens": 1}
        for name, smallest in (least | {"budget_factor": 1.1, "size_factor": 1.1}).items():
            check_number(name, getattr(self, name), least=smallest)
        if self.warmup_fraction + self.decay_fraction >= 1:
            both = f"warmup_fraction={self.warmup_fraction!r} and decay_fraction={self.decay_fraction!r}"
            raise InputError(f"{both} must be less than 1 together")
        check_number("final_fraction", self.final_fraction, least=0, most=1)
        check_number("tokens_per_parameter", self.tokens_per_parameter, above=0)
        check_number("optimum_exponent", self.optimum_exponent, above=0, below=1)
        if self.branches and not self.decay_fraction:
            raise InputError("decay_fraction=0 leaves a branch nothing to cool down in; give, for example, 0.2")

    def _check_budgets(self) -> None:
        if not self.budgets and not self.hours:
            raise InputError("a design needs budgets, in FLOPs, or hours to size them from")
        if self.budgets and self.hours:
            raise InputError(f"budgets and hours={self.hours:g} both say how long a study is; give one")
        for budget in self.budgets:
            check_number("a budget", budget, above=0, hint="budgets are FLOPs")
        for low, high in zip(self.budgets, self.budgets[1:], strict=False):
            if not high >= 1.1 * low:
                raise InputError(f"budgets must ascend by a factor of at least 1.1; {high:g} follows {low:g}")
        if self.held_out >= (len(self.budgets) or self.count):
            raise InputError(
                f"held_out={self.held_out} leaves none of {counted(len(self.budgets) or self.count, 'budget')} to fit"
            )


def _read_tables(design: Design) -> None:
    """Convert the plain values of TOML and JSON to the types of the fields."""

    def put(name: str, value: Any) -> None:
        object.__setattr__(design, name, value)

    if not isinstance(design.base, str):
        raise InputError(f"base={design.base!r} must be a preset's name or a JSON file of a model config")
    if not isinstance(design.budgets, (list, tuple)):
        raise InputError(f"budgets={design.budgets!r} must be a list of FLOPs, such as [1e11, 2e11]")
    put("budgets", tuple(design.budgets))
    if not isinstance(design.set, dict):
        raise InputError(f"set={design.set!r} must be a table of fields and their values")
    if not isinstance(design.family, (dict, ModelFamily)):
        raise InputError(f"family={design.family!r} must be a table, such as {{aspect_ratio = 16}}")
    if isinstance(design.family, dict):
        put("family", ModelFamily.from_dict(design.family))
    for name, kind, words in (("learning_rate", (int, float), "positive"), ("batch_size", int, "positive whole")):
        value = getattr(design, name)
        if isinstance(value, dict):
            put(name, Law.from_dict(value))
        elif not isinstance(value, Law) and not (_is_number(value) and isinstance(value, kind) and value > 0):
            raise InputError(f"{name}={value!r} must be a {words} number, or the table of a law")
    if isinstance(design.batch_size, Law) and "d_model" in design.batch_size.exponents:
        raise InputError("batch_size cannot be a law of d_model; take params, tokens or flops")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
