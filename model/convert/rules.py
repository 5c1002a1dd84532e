"""Which of their tensors is which of our leaves: rows with templates, and the tables' small vocabulary for them."""

import dataclasses
from collections.abc import Callable

from model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor name of theirs.

    ours: leaves; several where one tensor holds them one after the other along its output axis. {i} is a layer and {e}
    an expert, in ours and theirs alike. A row counts for a model that has its leaves and for which `when` holds.
    transposed: it is stored (out, in), as torch's Linear is. outside: not a part of the base model, so that its name
    has no prefix. optional: never written, and read only from files that have the name, in place of what else would
    fill its leaves. fallback: the name to read where `theirs` is absent.
    """

    ours: tuple[str, ...]
    theirs: str
    transposed: bool = False
    outside: bool = False
    optional: bool = False
    fallback: str | None = None
    when: Callable[[ModelConfig], bool] = lambda config: True

    def replace(self, **changes) -> "Row":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def table(ours: str, theirs: str, transposed: bool = False) -> tuple[Row, ...]:
    """A single array."""
    return (Row((ours,), theirs, transposed),)


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    """A norm's scale and, where there is one, its bias."""
    return Row((f"{ours}/scale",), f"{theirs}.weight"), Row((f"{ours}/bias",), f"{theirs}.bias")


def linear(ours: str | tuple[str, ...], theirs: str, transposed: bool = True) -> tuple[Row, ...]:
    """A projection, or several fused, stored (out, in)."""
    leaves = (ours,) if isinstance(ours, str) else ours
    return (
        Row(tuple(f"{leaf}/weight" for leaf in leaves), f"{theirs}.weight", transposed),
        Row(tuple(f"{leaf}/bias" for leaf in leaves), f"{theirs}.bias"),
    )


def conv(ours: str | tuple[str, ...], theirs: str) -> tuple[Row, ...]:
    """The same, stored (in, out) as OpenAI's Conv1D is."""
    return linear(ours, theirs, transposed=False)


def experts(theirs: str, up: str, gate: str, down: str) -> tuple[Row, ...]:
    """One tensor for each expert and projection."""
    names = {"up": up, "gate": gate, "down": down}
    return tuple(Row((f"feed_forward/experts/{o}",), f"{theirs}.{t}.weight", transposed=True) for o, t in names.items())


def fused_experts(theirs: str) -> tuple[Row, ...]:
    """Transformers 5's own layout: all experts in one tensor, gate and up in one."""
    pair = ("feed_forward/experts/gate", "feed_forward/experts/up")
    return (
        Row(pair, f"{theirs}.gate_up_proj", transposed=True, optional=True),
        Row(("feed_forward/experts/down",), f"{theirs}.down_proj", transposed=True, optional=True),
    )


def within(ours: str, theirs: str, *groups: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows of a part of the model, e.g. of a layer, with both sides' names before theirs."""
    return tuple(
        row.replace(ours=tuple(f"{ours}{leaf}" for leaf in row.ours), theirs=f"{theirs}{row.theirs}")
        for group in groups
        for row in group
    )


def of_head(kind: str, *groups: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows of the head of that kind, outside the base model."""
    of_kind = lambda config: config.head == kind
    return tuple(row.replace(outside=True, when=of_kind) for group in groups for row in group)


DECODER_HEADS = (
    *of_head("language-model", table("head/weight", "lm_head.weight", transposed=True)),
    *of_head("classifier", table("head/weight", "score.weight", transposed=True)),
)
