"""Named activations, which a pass can return and edit (activation patching, ablation, steering)."""

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
"""The axes of every named activation. In an encoder-decoder they are the decoder's.

hidden: the residual stream; at 0 the embedding, at i the stream after the first i layers. attention: the weights of
self-attention after softmax and dropout, in float32. heads: the output of each head before the output matrix; value_dim
is `head_dim`, in latent attention `v_dim`. attention_output, feed_forward_output: the output of that branch as added to
the residual stream, after dropout and muP's multiplier; with "sandwich" norms after the second norm, with "post" norms
before the norm of the sum.
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
    """An edit of an activation x: where `where` is True, x becomes `value`, or without one factor · x + shift.

    Each field is None, which leaves it out, or an array that broadcasts against the activation with its axis of layers
    (see TAPS): a scalar, a vector of size d_model, or an array with any axes of size 1. Numbers are cast to the
    activation's dtype. A value excludes factor and shift; use a tuple of edits, which are applied in order. Edits are
    pytrees, which `jax.jit`, `jax.vmap` and `jax.grad` take like other inputs.
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
        """Return the edited activation; entries where `where` is False keep their exact bits."""
        edited = x
        if self.value is not None:
            edited = jnp.broadcast_to(jnp.asarray(self.value, x.dtype), x.shape)
        else:
            if self.factor is not None:
                edited = jnp.asarray(self.factor, x.dtype) * edited
            if self.shift is not None:
                edited = edited + jnp.asarray(self.shift, x.dtype)
        return edited if self.where is None else jnp.where(self.where, edited, x)


Edits = Mapping[str, Any]
"""{name of an activation: an Edit, or a tuple of several, applied in order}."""
WholeEdits = dict[str, tuple[Edit, ...]]
"""Edits after `check_edits`: arrays have all axes of the activation, and its full number of layers."""


def check_edits(edits: Any, shapes: Mapping[str, tuple[int, ...]]) -> WholeEdits:
    """Validate edits (None: no edits) and broadcast them over layers.

    shapes: of the activations that can be edited. A field of shape [d_model] becomes [layers, 1, 1, d_model] for an
    activation [layers, batch, seq, d_model]. Raises InputError for an unknown name, for anything but an Edit, for a
    value together with a factor or a shift, and for fields that are not numbers (`where`: booleans) or do not
    broadcast.
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
    """Return the edits of one layer: every leaf at that index of its axis of layers."""
    return jax.tree.map(lambda leaf: leaf[layer], edits)


def edit_embedded(
    x: Float[Array, "batch seq d_model"], edits: WholeEdits
) -> tuple[Float[Array, "batch seq d_model"], WholeEdits]:
    """Apply the edits of "hidden" at 0 to the embedding; return it and the edits of the layers, without index 0."""
    if "hidden" not in edits:
        return x, edits
    for edit in edits_of(edits, 0)["hidden"]:
        x = edit(x)
    return x, edits | {"hidden": jax.tree.map(lambda leaf: leaf[1:], edits["hidden"])}


def _whole(name: str, edit: Edit, shape: tuple[int, ...]) -> Edit:
    arrays = {field: getattr(edit, field) for field in ("value", "factor", "shift", "where")}
    if edit.value is not None and not (edit.factor is None and edit.shift is None):
        raise InputError(
            f"edits[{name!r}] has both a value and a factor or a shift, which it would replace; give a tuple of two "
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
    """Return a field as an array of booleans (`where`) or real numbers (others). Raises InputError."""
    try:
        array = jnp.asarray(given)
    except (TypeError, ValueError):  # strings, or nested lists of different lengths
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
    """The named activations of one layer: edits them and keeps those in `wanted`.

    wanted: names in TAPS. edits: of this layer (`edits_of`). kept: {name: activation after its edits}.
    """

    def __init__(self, wanted: Sequence[str] = (), edits: WholeEdits | None = None):
        self.wanted, self.edits = frozenset(wanted), edits or {}
        self.kept: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        """Return whether this activation is kept or edited, so that it must be computed."""
        return name in self.wanted or name in self.edits

    def __call__(self, name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return the activation after its edits, and keep it if it is wanted."""
        for edit in self.edits.get(name, ()):
            x = edit(x)
        if name in self.wanted:
            self.kept[name] = x
        return x


NO_TAPS = Taps()
