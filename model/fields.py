"""Fields of the frozen dataclasses that describe a model: known, complete and of their types, or else a sentence."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from model.checks import check_bool, check_number, check_whole
from model.errors import InputError, UnknownNameError


class FrozenDict(dict[str, Any]):
    """A dict that hashes and cannot be changed, for a field of what is static.

    It equals a mapping of the same items in the same order.
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and tuple(self.items()) == tuple(other.items())

    def __ne__(self, other: object) -> bool:  # dict has one of its own, which ignores the order
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are made at once, not item by item
        return type(self), (dict(self),)

    def _refuse(self, *arguments: Any, **values: Any) -> Any:
        raise TypeError("a FrozenDict cannot be changed; make another one")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def check_names(cls: type, names: Iterable[str], *, complete: bool) -> None:
    """Raise UnknownNameError for a name that is no field of a dataclass; complete: InputError where one is missing."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    given = set()
    for name in names:
        if name not in fields:
            raise UnknownNameError(f"{cls.__name__} field", name, fields)
        given.add(name)
    missing = [name for name in fields if fields[name].default is dataclasses.MISSING and name not in given]
    if complete and missing:
        raise InputError(f"{cls.__name__} lacks {', '.join(missing)}")


def check_types(made: Any, positive: Collection[str], prefix: str = "") -> None:
    """Raise InputError unless every field of a dataclass is of its annotated type, or None where that is its default.

    Numbers are finite and at least 0; `positive` names the fields that 0 is too small for. Of tuples and of texts
    nothing is checked. prefix: before the names of fields in messages.
    """
    for name, kind, may_be_null in _kinds(type(made)):  # type: ignore[arg-type]
        value = getattr(made, name)
        if value is None and may_be_null:
            continue
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise UnknownNameError(prefix + name, str(value), get_args(kind))
        elif kind is bool:
            check_bool(prefix + name, value)
        elif kind is int:
            check_whole(prefix + name, value, 1 if name in positive else 0, plain=True)
        elif kind is float and name in positive:
            check_number(prefix + name, value, above=0, plain=True)
        elif kind is float:
            check_number(prefix + name, value, least=0, plain=True)
        elif dataclasses.is_dataclass(kind) and not isinstance(value, kind):  # type: ignore[arg-type]
            raise InputError(f"{prefix}{name} must be {kind.__name__}'s fields or null, not {value!r}")  # type: ignore[union-attr]


@functools.cache
def _kinds(cls: type) -> list[tuple[str, Any, bool]]:
    """Every field's name, its type without None, and whether None is its default."""
    hints, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        kinds = [kind for kind in get_args(hints[field.name]) if kind is not NoneType]
        # A union of several kinds is its owner's to check.
        optional = get_origin(hints[field.name]) in (Union, UnionType) and len(kinds) == 1
        found.append((field.name, kinds[0] if optional else hints[field.name], field.default is None))
    return found
