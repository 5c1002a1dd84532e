"""Options for running a model that change its results by rounding alone, unlike those of `ModelConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from model.errors import InputError
from model.fields import FrozenDict, check_names, check_types

Remat = Literal["none", "full", "dots"]
AttentionKernel = Literal["auto", "xla", "cudnn", "pallas"]
Platform = Literal["cpu", "gpu", "tpu"]

# Layers are unrolled below this d_model, where the overhead of a loop is noticeable, and for these numbers of layers:
# fewer save nothing, more take long to compile.
_NARROW = 256
_UNROLLED = range(3, 17)


@dataclasses.dataclass(frozen=True)
class Execution:
    """Static options of a program. Any of them may change when a run is resumed.

    remat: the activations that the backward pass recomputes: none ("none"), all of a layer ("full"), or all of a layer
    but its matrix products ("dots"). scan_layers: run the layers by `lax.scan` (true) or unrolled; None: unrolled where
    d_model < 256 and there are 3 to 16 layers, for which the loop costs more than it saves. attention_kernel: see
    `model/kernels.py`. mesh: the sizes of the axes, such as {"data": 2, "fsdp": 4}; None: all devices on "data".
    platform: the platform that kernels are chosen for; None: that of the mesh. accumulate: the number of equal
    microbatches of a batch, whose gradients are accumulated. loss_chunks: the number of chunks of the sequence in which
    head and loss are computed, so that only one chunk's logits are in memory. lanes: the number of lanes in the program
    that trains a population; None: one for each member. mesh and lanes are read by the training loop only: a pure
    function runs on the devices of its arguments.

    With dropout or experts `accumulate` changes more than rounding and is part of a run's identity (`train/recipe.py`).
    """

    remat: Remat = "none"
    scan_layers: bool | None = None
    attention_kernel: AttentionKernel = "auto"
    mesh: Mapping[str, int] | None = None
    platform: Platform | None = None
    accumulate: int = 1
    loss_chunks: int = 1
    lanes: int | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None:
            object.__setattr__(self, "mesh", _mesh(self.mesh))
        check_types(self, ("accumulate", "loss_chunks", "lanes"))

    def scans(self, config: Any) -> bool:
        """Return whether this model's layers run by `lax.scan`."""
        if self.scan_layers is None:
            return config.d_model >= _NARROW or config.num_layers not in _UNROLLED
        return self.scan_layers

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        check_names(type(self), changes, complete=False)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which `from_dict` reads back to an equal Execution."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"mesh": None if self.mesh is None else dict(self.mesh)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s output; missing fields get their defaults. Raises InputError for an unknown field."""
        check_names(cls, values, complete=False)
        return cls(**values)


def _mesh(axes: Any) -> FrozenDict:
    """Return the axes sorted by name, so that equal meshes have equal values. Raises InputError for a bad size."""
    sizes = axes.values() if isinstance(axes, Mapping) else [axes]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise InputError(f"mesh={axes!r} must be axes and their sizes, such as {{'data': 2, 'fsdp': 4}}")
    return FrozenDict({name: axes[name] for name in sorted(axes)})


FIELDS = tuple(field.name for field in dataclasses.fields(Execution))


def refuse_moved(cls: type, *names: str) -> None:
    """Make a dataclass raise, for fields that moved to Execution, raise an error if one is set or read."""
    init = cls.__init__  # type: ignore[misc]

    def checked(self: Any, *arguments: Any, **values: Any) -> None:
        for name in values:
            if name in names:
                raise InputError(moved(cls, name))
        init(self, *arguments, **values)

    def missing(self: Any, name: str) -> Any:
        raise AttributeError(moved(cls, name) if name in names else f"{cls.__name__} has no attribute {name!r}")

    checked.__wrapped__ = init  # type: ignore[attr-defined]  # help() and editors show the fields
    checked.__doc__ = init.__doc__
    cls.__init__, cls.__getattr__ = checked, missing  # type: ignore[misc, attr-defined]


def moved(cls: type, name: str) -> str:
    """Return the message that a field is now one of Execution."""
    return f"{name} is not a field of {cls.__name__} but of Execution; give execution=Execution({name}=…)"
