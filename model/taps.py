"""Activations by name: which of them a pass returns, and which it changes (patching, ablation, steering)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from model.config import ModelConfig
from model.errors import InputError, UnknownNameError

TAPS = {
    "hidden": ("layers_and_one", "batch", "seq", "d_model"),
    "attention": ("layers", "batch", "heads", "seq", "key"),
    "heads": ("layers", "batch", "seq", "heads", "value_dim"),
    "attention_output": ("layers", "batch", "seq", "d_model"),
    "feed_forward_output": ("layers", "batch", "seq", "d_model"),
}
"""The axes of every activation that has a name. An encoder-decoder's are those of its decoder.

hidden: the residual stream; at 0 what the embedding gives, at i what the first i layers leave. attention: the weights
with which a layer's tokens attend to one another, after softmax and dropout, in float32. heads: what each head mixes of
the values, before the output matrix; value_dim is `head_dim`, of latent attention its `v_dim`. attention_output,
feed_forward_output: what that branch adds to the residual stream, after dropout and muP's multiplier; with "sandwich"
norms after the second norm too, with "post" norms before the norm of the sum.
"""


def tap_shapes(config: ModelConfig, batch: int, seq: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every activation in TAPS for a pass over whole rows."""
    sizes = {
        "layers_and_one": config.num_layers + 1,
        "layers": config.num_layers,
        "batch": batch,
        "seq": seq,
        "key": seq,
        "d_model": config.d_model,
        "heads": config.num_heads,
        "value_dim": config.head_dim if config.latent is None else config.latent.v_dim,
    }
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in TAPS.items()}


@struct.dataclass
class Edit:
    """A change of one activation x: it becomes `value`, or without one factor · x + shift, where `where` is True.

    Each is None, which leaves that part out, or an array that broadcasts against the whole activation, layers first
    (see TAPS): a scalar, a vector of size d_model, or an array with axes of size 1, the layers' too. Numbers are
    rounded to the activation's dtype. A value goes with neither factor nor shift: a tuple of edits applies one after
    the other. A pytree: `jax.jit`, `jax.vmap` and `jax.grad` take edits like other inputs.
    """

    value: Any = None
    factor: Any = None
    shift: Any = None
    where: Any = None

    @staticmethod
    def zero(where: Any = None) -> "Edit":
        """Set the activation to zero (ablation)."""
        return Edit(value=jnp.zeros((), jnp.float32), where=where)

    @staticmethod
    def scale(factor: Any, where: Any = None) -> "Edit":
        """Multiply the activation by a factor."""
        return Edit(factor=factor, where=where)

    @staticmethod
    def add(shift: Any, where: Any = None) -> "Edit":
        """Add to the activation (steering)."""
        return Edit(shift=shift, where=where)

    @staticmethod
    def patch(value: Any, where: Any = None) -> "Edit":
        """Replace the activation by a value, such as the same activation of another run (activation patching)."""
        return Edit(value=value, where=where)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return the edited activation; entries where `where` is False are returned as they are, to the bit."""
        cast = lambda array: jnp.asarray(array, x.dtype)
        edited = x
        if self.value is not None:
            edited = jnp.broadcast_to(cast(self.value), x.shape)
        else:
            if self.factor is not None:
                edited = cast(self.factor) * edited
            if self.shift is not None:
                edited = edited + cast(self.shift)
        return edited if self.where is None else jnp.where(self.where, edited, x)


Edits = Mapping[str, Any]
"""By the name of an activation: an Edit of it, or a tuple of several, applied in order."""
WholeEdits = dict[str, tuple[Edit, ...]]
"""The same after `check_edits`: all arrays have all axes, and the layers' axis is as long as the activation's."""


def check_edits(edits: Any, shapes: Mapping[str, tuple[int, ...]]) -> WholeEdits:
    """Return edits (see Edits; None: none) with all axes, the layers' at its full length.

    shapes: of the activations that can be edited.
    Raises InputError on an unknown name, on what is no Edit, on a value beside a factor or a shift, and where fields
    are no numbers (`where`: booleans) or do not broadcast.
    """
    if not isinstance(edits, Mapping | None):
        raise InputError(f"edits is of type {type(edits).__name__}; give a dict such as {{'hidden': Edit.zero()}}")
    whole: WholeEdits = {}
    for name, given in (edits or {}).items():
        if name not in shapes:
            raise UnknownNameError("name in edits", name, shapes, guess=False)
        several = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        for edit in several:
            if not isinstance(edit, Edit):
                raise InputError(f"edits[{name!r}] has a {type(edit).__name__}; give an Edit, such as Edit.zero()")
        whole[name] = tuple(_whole(name, edit, shapes[name]) for edit in several)
    return whole


def edits_of(edits: WholeEdits, layer: int) -> WholeEdits:
    """Return the edits of one layer, without the axis of layers."""
    return jax.tree.map(lambda leaf: leaf[layer], edits)


def edit_embedded(
    x: Float[Array, "batch seq d_model"], edits: WholeEdits
) -> tuple[Float[Array, "batch seq d_model"], WholeEdits]:
    """Return what the embedding gives after its edits, and the edits of the layers, whose "hidden" starts at 1."""
    if "hidden" not in edits:
        return x, edits
    for edit in edits_of(edits, 0)["hidden"]:
        x = edit(x)
    return x, edits | {"hidden": jax.tree.map(lambda leaf: leaf[1:], edits["hidden"])}


def _whole(name: str, edit: Edit, shape: tuple[int, ...]) -> Edit:
    arrays = {field: getattr(edit, field) for field in ("value", "factor", "shift", "where")}
    if edit.value is not None and not (edit.factor is None and edit.shift is None):
        raise InputError(
            f"edits[{name!r}] has a value beside a factor or a shift, which it would replace; give a tuple of two "
            "edits, which are applied in order"
        )
    for field, given in arrays.items():
        if given is None:
            continue
        array = _numbers(name, field, given)
        if not _broadcasts(array.shape, shape):
            axes = ", ".join(f"{axis}={size}" for axis, size in zip(TAPS[name], shape, strict=True))
            raise InputError(
                f"edits[{name!r}].{field} of shape {array.shape} does not broadcast against {name} [{axes}]; "
                "give every axis its size or 1"
            )
        array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        arrays[field] = jnp.broadcast_to(array, (shape[0], *array.shape[1:]))
    return Edit(**arrays)


def _numbers(name: str, field: str, given: Any) -> Array:
    """A field's array: booleans for `where`, else real numbers."""
    try:
        array = jnp.asarray(given)
    except (TypeError, ValueError):  # text, or lists of several lengths
        kind = f"of type {type(given).__name__}"
    else:
        kinds = (jnp.bool_,) if field == "where" else (jnp.floating, jnp.integer)
        if any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            return array
        kind = f"of dtype {array.dtype}"
    raise InputError(
        f"edits[{name!r}].{field} is {kind}; where is a boolean mask, the others are arrays of real numbers"
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


class Taps:
    """The activations of one layer as it runs: applies the edits, and keeps what was requested.

    wanted: names in TAPS. edits: of this layer, without an axis of layers.
    """

    def __init__(self, wanted: Sequence[str] = (), edits: WholeEdits | None = None):
        self.wanted, self.edits = frozenset(wanted), edits or {}
        self.kept: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        """Return whether this activation is kept or edited, and so must be computed."""
        return name in self.wanted or name in self.edits

    def __call__(self, name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return the activation after its edits; that is also what is kept of it."""
        for edit in self.edits.get(name, ()):
            x = edit(x)
        if name in self.wanted:
            self.kept[name] = x
        return x


NO_TAPS = Taps()
