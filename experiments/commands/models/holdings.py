"""Compute what each device of a mesh holds in training, from shapes alone: the mesh need not exist."""

import math
from typing import TYPE_CHECKING, Any

from experiments.commands.options import new_table
from experiments.words import bytes_in_words

if TYPE_CHECKING:
    from rich.table import Table

    from model import ModelConfig

GROUPS = ("embedding", "attention", "feed-forward", "experts", "norms", "head")
BYTES = 4  # parameters and Adam's two moments are float32


def holdings(config: "ModelConfig", axes: dict[str, int]) -> dict[str, Any]:
    """Return {"axes", "devices", "groups", "total", "parameters"}: bytes of every group in total and per device.

    Adam's state is two moments of the parameters' shapes. copies: how often a byte is held over the mesh, on average.
    A group's split is that of its largest parameter.
    """
    from model.convert.plan import shapes_of
    from model.sharding import abstract_mesh, spec_for

    mesh = abstract_mesh(axes)
    leaves = []
    for path, shape in shapes_of(config).items():
        spec = spec_for(mesh, path, shape)
        over = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in spec]
        over += [()] * (len(shape) - len(over))
        leaves.append(
            {
                "path": "/".join(path),
                "group": _group(path),
                "shape": list(shape),
                "split": [list(names) for names in over],
                "bytes": BYTES * math.prod(shape),
                "device_bytes": BYTES * math.prod(shape) // math.prod(mesh.shape[a] for names in over for a in names),
            }
        )
    groups = {name: [leaf for leaf in leaves if leaf["group"] == name] for name in GROUPS}
    return {
        "axes": dict(mesh.shape),
        "devices": mesh.size,
        "groups": {name: _sum(held, mesh.size) | _largest(held) for name, held in groups.items() if held},
        "total": _sum(leaves, mesh.size),
        "parameters": leaves,
    }


def _group(path: tuple[str, ...]) -> str:
    parent = path[-2]
    if parent.endswith("norm"):
        return "norms"
    if parent == "experts":
        return "experts"
    for part, group in (("feed_forward", "feed-forward"), ("embedding", "embedding")):
        if part in path:
            return group
    return "head" if path[0] in ("head", "pooler") else "attention"


def _sum(leaves: list[dict[str, Any]], devices: int) -> dict[str, Any]:
    whole, held = (sum(leaf[name] for leaf in leaves) for name in ("bytes", "device_bytes"))
    return {
        "parameter_bytes": whole,
        "parameter_bytes_per_device": held,
        "adam_bytes_per_device": 2 * held,
        "copies": held * devices / whole,
    }


def _largest(leaves: list[dict[str, Any]]) -> dict[str, Any]:
    largest = max(leaves, key=lambda leaf: leaf["bytes"])
    return {"largest": largest["path"], "shape": largest["shape"], "split": largest["split"]}


def mesh_table(held: dict[str, Any]) -> "Table":
    """Return a line per group, and their sum."""
    used = ", ".join(f"{name}={size}" for name, size in held["axes"].items() if size > 1) or "one device"
    table = new_table(f"training on {used}", "whole", "per device", "with Adam", "copies", "split of the largest")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for name, group in held["groups"].items():
        table.add_row(name, *_numbers(group), _split(group["shape"], group["split"], held["axes"]))
    table.add_section()
    table.add_row("total", *_numbers(held["total"]), style="bold")
    return table


MESH_NOTE = (
    "Float32; with Adam: parameters and both moments. Gradients take once more what the parameters do, for a moment. "
    "copies: how often a byte is held on the whole mesh."
)


def _numbers(held: dict[str, Any]) -> tuple[str, ...]:
    parameters = held["parameter_bytes_per_device"]
    with_adam = parameters + held["adam_bytes_per_device"]
    sizes = (held["parameter_bytes"], parameters, with_adam)
    return (*map(bytes_in_words, sizes), f"{held['copies']:.3g}")


def _split(shape: list[int], split: list[list[str]], axes: dict[str, int]) -> str:
    """Write a shape with its sharding: 32 × 4096/fsdp 4 × 4096."""
    parts = [
        f"{length:,}" + (f"/{'·'.join(names)} {math.prod(axes[name] for name in names)}" if names else "")
        for length, names in zip(shape, split, strict=True)
    ]
    return " × ".join(parts)
