"""What a training run is made of: `TrainConfig` is static (it changes a shape or the program),
`HParams` is data (traced, so that a sweep over it compiles nothing).
"""

import dataclasses
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import numpy as np

from model.errors import InputError, UnknownNameError

Schedule = Literal["constant", "linear", "cosine", "wsd"]
Optimizer = Literal["adamw", "sgd", "muon"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The static half: shapes and the choice of program.

    batch_size: rows per step. seq_len: tokens per row. optimizer: see `train/optimizer.py`. dropout: whether dropout
    is compiled in at all.
    segment_documents: whether packed documents attend only to themselves.
    """

    batch_size: int = 8
    seq_len: int = 128
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "cosine"
    dropout: bool = False
    segment_documents: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}={value!r} must be a whole number of at least 1")
        for name, choices in (("schedule", get_args(Schedule)), ("optimizer", get_args(Optimizer))):
            if getattr(self, name) not in choices:
                raise UnknownNameError(name, str(getattr(self, name)), choices)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one batch."""
        return self.batch_size * self.seq_len

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        _refuse_unknown("TrainConfig field", changes, self.to_dict())
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@jax.tree_util.register_pytree_node_class
class HParams:
    """The traced half: every leaf a strong float32 or int32 scalar, so that no weak type doubles a compile.

    learning_rate: the schedule's peak. weight_decay: decoupled, times the learning rate; matrices only.
    beta1, beta2, epsilon: Adam's; beta1 is also the momentum of "sgd" and "muon".
    warmup_steps: linear from 0. total_steps: the schedule's horizon; 0: the steps that `train` is asked for.
    decay_fraction: the last part of a "wsd" schedule, falling linearly. final_fraction: rate at the horizon
    over the peak. clip_norm: global gradient norm; 0: no clipping. z_loss: weight of mean(log Z)².
    balance_loss, router_z_loss: weights of the losses of a mixture of experts (`model/moe.py`).
    dropout_rate: used where TrainConfig.dropout is on. init_scale: times every initial matrix.
    seed: parameters, dropout and the order of the data.
    """

    DEFAULTS: ClassVar[dict[str, float]] = {
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "warmup_steps": 0,
        "total_steps": 0,
        "decay_fraction": 0.2,
        "final_fraction": 0.1,
        "clip_norm": 1.0,
        "z_loss": 0.0,
        "balance_loss": 0.01,
        "router_z_loss": 0.001,
        "dropout_rate": 0.0,
        "init_scale": 1.0,
        "seed": 0,
    }
    NAMES = tuple(DEFAULTS)

    learning_rate: Any
    weight_decay: Any
    beta1: Any
    beta2: Any
    epsilon: Any
    warmup_steps: Any
    total_steps: Any
    decay_fraction: Any
    final_fraction: Any
    clip_norm: Any
    z_loss: Any
    balance_loss: Any
    router_z_loss: Any
    dropout_rate: Any
    init_scale: Any
    seed: Any

    def __init__(self, **values: float):
        _refuse_unknown("hyperparameter", values, self.DEFAULTS)
        for name, default in self.DEFAULTS.items():
            object.__setattr__(self, name, _strong(name, values.get(name, default), isinstance(default, int)))

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"HParams is frozen; use replace({name}=…)")

    def __repr__(self) -> str:
        return "HParams(" + ", ".join(f"{name}={getattr(self, name)}" for name in self.NAMES) + ")"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HParams) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def replace(self, **changes: float) -> "HParams":
        """A copy with some values changed."""
        _refuse_unknown("hyperparameter", changes, self.DEFAULTS)
        return HParams(**{**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for JSON: the shortest decimal that reads back to the same float32."""
        return {
            name: int(value) if isinstance(self.DEFAULTS[name], int) else float(str(np.float32(value)))
            for name, value in ((name, getattr(self, name)) for name in self.NAMES)
        }

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """For JAX."""
        return tuple(getattr(self, name) for name in self.NAMES), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Any, ...]) -> "HParams":
        """For JAX: the leaves may be tracers, so nothing is converted or checked."""
        new = object.__new__(cls)
        for name, leaf in zip(cls.NAMES, leaves, strict=True):
            object.__setattr__(new, name, leaf)
        return new


def stack_hparams(hparams: list[HParams]) -> HParams:
    """One HParams whose leaves are arrays [lanes]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *hparams)


_RANGES: dict[str, tuple[float, float, str]] = {
    "learning_rate": (0, np.inf, "at least 0"),
    "weight_decay": (0, np.inf, "at least 0"),
    "beta1": (0, 1, "in [0, 1)"),
    "beta2": (0, 1, "in [0, 1)"),
    "epsilon": (0, np.inf, "at least 0"),
    "warmup_steps": (0, 2**31, "at least 0"),
    "total_steps": (0, 2**31, "at least 0"),
    "decay_fraction": (0, 1 + 1e-9, "in [0, 1]"),
    "final_fraction": (0, 1 + 1e-9, "in [0, 1]"),
    "clip_norm": (0, np.inf, "at least 0"),
    "z_loss": (0, np.inf, "at least 0"),
    "balance_loss": (0, np.inf, "at least 0"),
    "router_z_loss": (0, np.inf, "at least 0"),
    "dropout_rate": (0, 1, "in [0, 1)"),
    "init_scale": (0, np.inf, "at least 0"),
    "seed": (0, 2**31, "at least 0"),
}


def _strong(name: str, value: float, whole: bool) -> np.int32 | np.float32:
    """The value as a strongly typed scalar; refused where it, or what float32 makes of it, is out of range."""
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
