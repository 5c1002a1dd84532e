"""Check the shapes and dtypes in annotations while tests run; see `conftest.py`."""

import typing
from collections.abc import Callable
from typing import Any

import beartype

# jaxtyping decorates methods, and beartype knows Self only where it decorates the class.
_CONF = beartype.BeartypeConf(is_pep484_tower=True, hint_overrides=beartype.FrozenDict({typing.Self: Any}))


def check(function: Callable) -> Callable:
    """Return the function with its arguments and result checked by beartype, if one of them is annotated as an array.

    Other functions check their own input where a user may give it wrongly, and tests do just that.
    """
    hints = getattr(function, "__annotations__", {}).values()
    return beartype.beartype(conf=_CONF)(function) if any(map(_has_array, hints)) else function


def _has_array(hint: Any) -> bool:
    """Return whether an annotation is one of jaxtyping's, or contains one, as dict[str, Float[Array, "rows"]] does."""
    return hasattr(hint, "dim_str") or any(map(_has_array, typing.get_args(hint)))
