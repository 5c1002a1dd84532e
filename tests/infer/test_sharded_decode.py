"""Decode over a mesh: what one device gives, while every device holds its part of the weights and of the cache."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.sharding import parse_mesh

GENERATES = {"generates": True}


def beside_one_device(*cases):
    """What `sharded.beside` finds for the cases, in a process of four devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    script = Path(__file__).with_name("sharded.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(cases)],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal_and_split(*cases):
    for case, found in zip(cases, beside_one_device(*cases), strict=True):
        axes = parse_mesh(case["mesh"])
        # To be rounded to the next of 255 values takes no more than a sum in another order.
        assert found["error"] < (2e-2 if case.get("cache") == "int8" else 1e-4), case
        if case.get("generates"):
            assert found["same"], case
            assert found["texts"] > 1, case
        else:
            assert found["empty"] == found["filled"], case
            assert_cache_is_split(found["filled"], axes, case)
        # What "data" repeats is whole; the rest holds little that cannot be cut: norms, biases, scales of int8.
        parts = axes.get("fsdp", 1) * axes.get("tensor", 1)
        if "expert" not in axes:
            assert 1 / parts <= found["share"] < 1 / parts + 0.1 * (parts > 1) + 1e-6, case
        else:
            assert found["share"] < 0.8 / parts, case


def assert_cache_is_split(shapes, axes, case):
    rows = math.prod(axes.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    for whole, part in shapes.items():
        batch, heads, *rest = json.loads(whole.replace("(", "[").replace(")", "]"))
        rows_here = batch // rows if batch % rows == 0 else batch
        assert part == [rows_here, heads // axes.get("tensor", 1), *rest], case


@pytest.mark.long
def test_a_mesh_decodes_as_one_device_and_holds_its_part():
    assert_equal_and_split(
        {"model": "dense", "mesh": "data=2,tensor=2", "weights": "int4"},
        {"model": "experts", "mesh": "expert=2", "weights": "int8"},
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "cases",
    [
        [
            {"model": "untied", "mesh": "data=4"},
            {"model": "untied", "mesh": "tensor=2"},
            {"model": "untied", "mesh": "data=2,tensor=2"},
            {"model": "untied", "mesh": "fsdp=2"},
        ],
        [
            {"model": "dense", "mesh": "data=2,tensor=2", "weights": None, "rows": 3},
            {"model": "dense", "mesh": "fsdp=2,tensor=2", "weights": None},
            {"model": "dense", "mesh": "data=2,tensor=2", "cache": "int8", "rows": 3},
            {"model": "dense", "mesh": "fsdp=2", "weights": "int4"},
            {"model": "dense", "mesh": "tensor=2", "weights": "int8"},
        ],
        [
            {"model": "experts", "mesh": "expert=2"},
            {"model": "experts", "mesh": "data=2,expert=2", "weights": "int8"},
            {"model": "experts", "mesh": "expert=2,tensor=2", "weights": "int8"},
        ],
        [
            {"model": "adapted", "mesh": "fsdp=2,tensor=2", "weights": None},
            {"model": "adapted-int4", "mesh": "tensor=2"},
        ],
        [{"model": "dense", "mesh": mesh} | GENERATES for mesh in ("data=4", "tensor=2", "fsdp=2")],
        [
            {"model": "dense", "mesh": "data=2,tensor=2", "weights": "int4"} | GENERATES,
            {"model": "dense", "mesh": "data=2,tensor=2", "cache": "int8", "rows": 3} | GENERATES,
        ],
        [{"model": "experts", "mesh": "expert=2", "weights": "int8"} | GENERATES],
    ],
    ids=["weights", "trained", "experts", "adapters", "texts", "texts-in-few-bits", "texts-of-experts"],
)
def test_all_meshes_decode_all_weights_as_one_device(cases):
    assert_equal_and_split(*cases)
