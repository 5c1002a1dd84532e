"""Validation of the fields of frozen dataclasses: names, completeness, types and ranges."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from model.errors import InputError, UnknownNameError, check_bool, check_number, check_whole


class FrozenDict(dict[str, Any]):
    """An immutable, hashable dict for fields of static arguments.

    It equals any mapping with the same items in the same order.
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and tuple(self.items()) == tuple(other.items())

    def __ne__(self, other: object) -> bool:  # that of dict ignores the order
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:  # the default would set items one by one
        return type(self), (dict(self),)

    def _refuse(self, *arguments: Any, **values: Any) -> Any:
        raise TypeError("a FrozenDict cannot be changed; make another one")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def check_names(cls: type, names: Iterable[str], *, complete: bool) -> None:
    """Raise UnknownNameError for a name that is not a field of the dataclass.

    complete: raise InputError if a field without default is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    given = set()
    for name in names:
        if name not in fields:
            raise UnknownNameError(f"{cls.__name__} field", name, fields)
        given.add(name)
    missing = [name for name in fields if fields[name].default is dataclasses.MISSING and name not in given]
    if complete and missing:
        raise InputError(f"{cls.__name__} lacks {', '.join(missing)}")


def check_types(instance: Any, positive: Collection[str], prefix: str = "") -> None:
    """Raise InputError unless every field of a dataclass is of its annotated type, or None if that is its default.

    Numbers must be finite and at least 0, fields in `positive` above 0. Tuples and strings are not checked. prefix:
    precedes the names of fields in messages.
    """
    for name, kind, optional in _field_types(type(instance)):  # type: ignore[arg-type]
        value = getattr(instance, name)
        if value is None and optional:
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
def _field_types(cls: type) -> list[tuple[str, Any, bool]]:
    """Return (name, type without None, whether None is the default) of every field."""
    hints, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        if get_origin(hint) in (Union, UnionType) and len(kinds) == 1:
            hint = kinds[0]  # a union of several types stays; its dataclass checks it
        found.append((field.name, hint, field.default is None))
    return found
