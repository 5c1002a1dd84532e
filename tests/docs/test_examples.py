"""Every file of experiments/configs is what the command that its README names for it takes."""

import json
from pathlib import Path

import pytest

from experiments.bench.decode.grid import check_grid, read_grid
from experiments.scaling.study.design import Design
from experiments.sweep.space.build import load_space
from model import presets
from train import TrainConfig
from train.plan import Plan

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.is_file() and path.suffix not in (".md", ".pyc"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_example_loads(file):
    assert f"`{file.name}`" in (CONFIGS / "README.md").read_text(encoding="utf-8")
    match file.suffix:
        case ".toml":
            assert Design.read(file).budgets
        case ".py":
            assert load_space(file.read_text(encoding="utf-8"), file)
        case ".json" if "phases" in file.name:
            phases = json.loads(file.read_text(encoding="utf-8"))
            assert Plan.of(TrainConfig(phases=phases)).total_steps > 100
        case ".json":
            cells = read_grid(json.loads(file.read_text(encoding="utf-8")), file.name)
            check_grid(presets.get("study-128"), cells, steps=32, repeats=1)
        case _:  # its command lines are parsed in test_docs.py
            assert file.suffix == ".sh"
