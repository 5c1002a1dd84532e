"""Configure a training run by two dataclasses.

`TrainConfig` is static: its fields change a shape or the program. `HParams` is data: its fields are traced, so that a
sweep over them compiles nothing.
"""

import dataclasses
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import numpy as np

from model.errors import InputError, UnknownNameError, check_bool, check_number, check_whole
from model.execution import Execution, moved, refuse_moved
from train.phases import Phase

Schedule = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
Optimizer = Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"]
Packing = Literal["contiguous", "best-fit"]
Order = Literal["shuffled", "sequential"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Static fields: shapes and the choice of program.

    batch_size: rows per step. seq_len: tokens per row. optimizer: see `train/optimizer.py`. schedule: see
    `train/schedule.py`. dropout: whether dropout is compiled in at all. segment_documents: whether documents in a row
    attend only to themselves. packing: how rows are filled: "contiguous": with windows of the concatenated documents;
    "best-fit": with whole documents (`train/data/packing.py`), which then attend only to themselves. norms: whether the
    metrics include the norms of every group of parameters. order: of the rows of an epoch: shuffled by the seed, or as
    they lie in the data folder.
    max_skipped: the number of consecutive steps that are not finite after which a run ends as diverged. spike_sigma: a
    loss more than this many standard deviations above the mean of the last `spike_window` losses rolls the run back, at
    most `max_rollbacks` times; 0: never.
    phases: the phases of the run (`train/plan.py`), instead of `schedule`; empty: one shape throughout.
    """

    batch_size: int = 8
    seq_len: int = 128
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "cosine"
    dropout: bool = False
    segment_documents: bool = False
    packing: Packing = "contiguous"
    order: Order = "shuffled"
    norms: bool = True
    max_skipped: int = 10
    spike_sigma: float = 0.0
    spike_window: int = 100
    max_rollbacks: int = 3
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            check_whole(name, getattr(self, name), least, plain=True)
        kinds = {"schedule": Schedule, "optimizer": Optimizer, "packing": Packing, "order": Order}
        for name, choices in ((name, get_args(kind)) for name, kind in kinds.items()):
            if getattr(self, name) not in choices:
                raise UnknownNameError(name, str(getattr(self, name)), choices)
        check_number("spike_sigma", self.spike_sigma, least=0)
        if not isinstance(self.phases, (list, tuple)):
            raise InputError(f"phases={self.phases!r} must be a list of phases")
        for name in ("dropout", "segment_documents", "norms"):
            check_bool(name, getattr(self, name))
        phases = (phase if isinstance(phase, Phase) else Phase.from_dict(phase) for phase in self.phases)
        object.__setattr__(self, "phases", tuple(phases))

    def check(self, execution: Execution) -> None:
        """Raise InputError unless `accumulate` divides every batch size and `loss_chunks` every row length."""
        batch_sizes = [self.batch_size, *(size for phase in self.phases for size in phase.batch_sizes)]
        seq_lens = [self.seq_len, *(phase.seq_len for phase in self.phases if phase.seq_len)]
        for name, shape, sizes in (("accumulate", "batch_size", batch_sizes), ("loss_chunks", "seq_len", seq_lens)):
            for size in sizes:
                if size % getattr(execution, name):
                    raise InputError(f"{name}={getattr(execution, name)} does not divide {shape}={size}")

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens in one batch."""
        return self.batch_size * self.seq_len

    @property
    def tells_documents_apart(self) -> bool:
        """Return whether documents attend only to themselves, by the batches' segment_ids, positions and loss_mask."""
        return self.segment_documents or self.packing == "best-fit"

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        for name in MOVED:
            if name in changes:
                raise InputError(moved(type(self), name))
        _refuse_unknown("TrainConfig field", changes, self.to_dict())
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**dataclasses.asdict(self), "phases": [phase.to_dict() for phase in self.phases]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Read `to_dict`'s output; missing fields get their defaults. Raises InputError on unknown ones.

        Fields of MOVED, which older versions wrote, are ignored.
        """
        values = {name: value for name, value in values.items() if name not in MOVED}
        _refuse_unknown("TrainConfig field", values, cls.__dataclass_fields__)
        return cls(**values)


MOVED = ("accumulate", "loss_chunks")
"""Fields that have moved to `model.execution.Execution`."""
refuse_moved(TrainConfig, *MOVED)
_LEAST = {
    **dict.fromkeys(("batch_size", "seq_len", "max_skipped"), 1),
    "spike_window": 2,  # one loss has no standard deviation
    "max_rollbacks": 0,
}

LOSS_SHAPING = (
    *("beta", "label_smoothing", "simpo_gamma", "nll_weight", "desirable_weight", "undesirable_weight"),
    *("divergence_alpha", "ld_alpha", "center_weight"),
)
"""Hyperparameters that define the loss: losses at different values of one cannot be compared.

`mask_rate` is not among them: validation masks tokens at a rate of its own.
"""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class HParams:
    """Traced fields: every leaf is a strongly typed float32 or int32 scalar, as weak types would compile a second time.

    learning_rate: the schedule's peak. weight_decay: of matrices only; decoupled, times the learning rate ("adam":
    added to the gradient). beta1, beta2, epsilon: Adam's; both betas are also Lion's, beta1 the momentum of "sgd" and
    "muon"; "adafactor" has none of them.
    warmup_steps: linear from 0; if 0, warmup_fraction of total_steps. total_steps: the schedule's horizon; 0: the steps
    that `train` runs. decay_steps: the last part of a "wsd" schedule, which falls linearly; if 0, decay_fraction of
    total_steps. final_fraction: rate at the horizon over the peak.
    clip_norm: global gradient norm; 0: no clipping. z_loss: weight of mean(log Z)².
    balance_loss, router_z_loss: weights of the losses of a mixture of experts (`model/moe.py`).
    lora_rank, lora_alpha: of a low-rank adapter, at most the objective's own rank; 0: the objective's. A smaller rank
    trains as an adapter of that rank does, except with Adafactor, whose clipping counts the unused columns too.
    beta: of preference losses: how closely the policy keeps to its reference. label_smoothing: share of the pairs whose
    labels are taken to be wrong. simpo_gamma: SimPO's target margin. nll_weight: of the loss of the chosen answers'
    tokens. desirable_weight, undesirable_weight: KTO's. divergence_alpha: order of "alpha_divergence". ld_alpha: weight
    of the log-probabilities of the tokens by which one answer of a pair is longer than the other. center_weight: of
    (r(chosen) + r(rejected))² in a reward model's loss.
    dropout_rate: used if TrainConfig.dropout is on. mask_rate: share of the tokens that masked language modelling
    predicts. init_scale: times every initial matrix.
    seed: parameters, dropout and the order of the data; data_seed: the order alone, -1: by `seed`.
    """

    learning_rate: Any = 3e-3
    weight_decay: Any = 0.1
    beta1: Any = 0.9
    beta2: Any = 0.95
    epsilon: Any = 1e-8
    warmup_steps: Any = 0
    warmup_fraction: Any = 0.0
    total_steps: Any = 0
    decay_fraction: Any = 0.2
    decay_steps: Any = 0
    final_fraction: Any = 0.1
    clip_norm: Any = 1.0
    z_loss: Any = 0.0
    balance_loss: Any = 0.01
    router_z_loss: Any = 0.001
    dropout_rate: Any = 0.0
    mask_rate: Any = 0.15
    lora_rank: Any = 0
    lora_alpha: Any = 0.0
    beta: Any = 0.1
    label_smoothing: Any = 0.0
    simpo_gamma: Any = 0.5
    nll_weight: Any = 0.0
    desirable_weight: Any = 1.0
    undesirable_weight: Any = 1.0
    divergence_alpha: Any = 0.5
    ld_alpha: Any = 1.0
    center_weight: Any = 0.0
    init_scale: Any = 1.0
    seed: Any = 0
    data_seed: Any = -1

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    NAMES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **values: float):
        _refuse_unknown("hyperparameter", values, self.DEFAULTS)
        for name, default in self.DEFAULTS.items():
            object.__setattr__(self, name, _strong(name, values.get(name, default), isinstance(default, int)))

    def __repr__(self) -> str:
        return "HParams(" + ", ".join(f"{name}={getattr(self, name)}" for name in self.NAMES) + ")"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HParams) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def replace(self, **changes: float) -> "HParams":
        """Return a copy with some values changed."""
        _refuse_unknown("hyperparameter", changes, self.DEFAULTS)
        return HParams(**{**self.to_dict(), **changes})

    @property
    def order_seed(self) -> int:
        """Return the seed of the order of the data."""
        return int(self.seed if self.data_seed < 0 else self.data_seed)

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers for JSON: the shortest decimals that read back to the same float32."""
        numbers: dict[str, float] = {}
        for name in self.NAMES:
            value = getattr(self, name)
            is_whole = isinstance(self.DEFAULTS[name], int)
            numbers[name] = int(value) if is_whole else float(str(np.float32(value)))
        return numbers

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Return the leaves for JAX."""
        return tuple(getattr(self, name) for name in self.NAMES), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Any, ...]) -> "HParams":
        """Rebuild from leaves for JAX; they may be tracers, so nothing is converted or checked."""
        new = object.__new__(cls)
        for name, leaf in zip(cls.NAMES, leaves, strict=True):
            object.__setattr__(new, name, leaf)
        return new


HParams.DEFAULTS = {field.name: field.default for field in dataclasses.fields(HParams)}
HParams.NAMES = tuple(HParams.DEFAULTS)


def stack_hparams(hparams: list[HParams]) -> HParams:
    """Stack hyperparameters into one HParams with leaves [lanes]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *hparams)


_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(HParams.NAMES, (0, np.inf, "at least 0")),
    **dict.fromkeys(("beta1", "beta2", "dropout_rate", "label_smoothing"), (0, 1, "in [0, 1)")),
    **dict.fromkeys(("warmup_fraction", "decay_fraction", "final_fraction", "ld_alpha"), (0, 1 + 1e-9, "in [0, 1]")),
    "mask_rate": (1e-9, 1 + 1e-9, "in (0, 1]"),
    **dict.fromkeys(("warmup_steps", "total_steps", "decay_steps", "lora_rank", "seed"), (0, 2**31, "at least 0")),
    "data_seed": (-1, 2**31, "at least 0, or -1"),
}


def _strong(name: str, value: float, whole: bool) -> np.int32 | np.float32:
    """Return the value as a strongly typed scalar. Raises InputError if it, or its float32 value, is out of range."""
    low, high, words = _RANGES[name]
    if not low <= value < high or (whole and value != int(value)):
        raise InputError(f"{name}={value!r} must be {'a whole number, ' if whole else ''}{words}")
    with np.errstate(over="ignore"):
        cast = np.int32(value) if whole else np.float32(value)
    if not low <= float(cast) < high:
        raise InputError(f"{name}={value!r} must be {words}; as a float32 it is {cast}")
    return cast


def _refuse_unknown(kind: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise UnknownNameError(kind, name, known)
