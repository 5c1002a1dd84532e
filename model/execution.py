"""Options for running a model. They are no part of what the model is: results change by rounding alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from model.errors import InputError
from model.fields import FrozenDict, check_names, check_types

Remat = Literal["none", "full", "dots"]
AttentionKernel = Literal["auto", "xla", "cudnn", "pallas"]
Platform = Literal["cpu", "gpu", "tpu"]

_NARROW = 256  # below this d_model the overhead of a loop over layers counts
_UNROLLED = range(3, 17)  # layers: for fewer it does not, and more take long to compile


@dataclasses.dataclass(frozen=True)
class Execution:
    """Static options of a program. Any of them may change when a run is resumed.

    remat: what the backward pass recomputes: nothing ("none"), a layer ("full"), or all of it but its matrix products
    ("dots"). scan_layers: layers as a `lax.scan` (true) or unrolled; None: unrolled where d_model < 256 and there are 3
    to 16 layers, for which the loop costs more than it saves. attention_kernel: see `model/kernels.py`.
    mesh: axes and their sizes, such as {"data": 2, "fsdp": 4}; None: all devices on "data". platform: that kernels are
    chosen for; None: the mesh's. accumulate: equal microbatches of a batch, one after the other, whose gradients are
    added. loss_chunks: pieces of the sequence in which head and loss are computed, so that the logits of only one
    are in memory. lanes: of the program that trains a population; None: as many as there are members. mesh and lanes
    are read by the loop: a pure function runs where its arguments lie.

    With dropout or experts `accumulate` changes more than rounding; there it is part of a run's identity
    (`train/recipe.py`).
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
        """Return whether the layers of this model are a loop."""
        if self.scan_layers is None:
            return config.d_model >= _NARROW or config.num_layers not in _UNROLLED
        return self.scan_layers

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        check_names(type(self), changes, complete=False)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back to an equal Execution."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"mesh": None if self.mesh is None else dict(self.mesh)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s output; a field that is not there has its default. Raises InputError on an unknown one."""
        check_names(cls, values, complete=False)
        return cls(**values)


def _mesh(axes: Any) -> FrozenDict:
    """Return the axes in the order of their names, so that one mesh is one value. Raises InputError."""
    sizes = axes.values() if isinstance(axes, Mapping) else [axes]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise InputError(f"mesh={axes!r} must be axes and their sizes, such as {{'data': 2, 'fsdp': 4}}")
    return FrozenDict({name: axes[name] for name in sorted(axes)})


FIELDS = tuple(field.name for field in dataclasses.fields(Execution))


def refuse_moved(cls: type, *names: str) -> None:
    """Have a dataclass that lost these fields to Execution say so, wherever one of them is given or read."""
    init, refusal = cls.__init__, lambda name: moved(cls, name)  # type: ignore[misc]

    def checked(self: Any, *arguments: Any, **values: Any) -> None:
        for name in values:
            if name in names:
                raise InputError(refusal(name))
        init(self, *arguments, **values)

    def missing(self: Any, name: str) -> Any:
        raise AttributeError(refusal(name) if name in names else f"{cls.__name__} has no attribute {name!r}")

    checked.__wrapped__ = init  # type: ignore[attr-defined]  # help() and editors show the fields
    checked.__doc__ = init.__doc__
    cls.__init__, cls.__getattr__ = checked, missing  # type: ignore[misc, attr-defined]


def moved(cls: type, name: str) -> str:
    """The sentence that a field is now one of Execution."""
    return f"{name} is no field of {cls.__name__}: how a model runs is an Execution; give execution=Execution({name}=…)"
