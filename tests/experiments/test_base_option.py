"""Commands that open a run which holds only what it trained find its base with --base where it was moved."""

import inspect

import pytest

from experiments.commands.bench.decode import decode
from experiments.commands.evaluate import evaluate
from experiments.commands.generate import generate
from experiments.commands.models.compress import compress
from experiments.commands.models.convert import convert
from experiments.commands.models.merge import merge
from experiments.commands.options import BasePath
from model import InputError, presets
from model.adapters import Adapter
from model.convert import load_hf
from model.store import open_parameters
from train import HParams, Recipe, Shell, TrainConfig, train, weights
from train.objectives import LanguageModeling

TINY = presets.get("tiny").replace(num_layers=1, max_seq_len=32, d_ff=48, vocab_size=320)
COMMANDS = {
    "generate": lambda run, data, out, base: generate(run, prompt=("a",), base=base),
    "eval": lambda run, data, out, base: evaluate(run, data=data, base=base),
    "convert": lambda run, data, out, base: convert(run, out, base=base),
    "merge": lambda run, data, out, base: merge(run, out, base=base),
    "compress": lambda run, data, out, base: compress(run, out, base=base),
    "bench decode": lambda run, data, out, base: decode(str(run), base=base),
}


@pytest.fixture(scope="module")
def places(data, tmp_path_factory):
    """(a run that trained an adapter, where its base is now); the base was moved."""
    folder = tmp_path_factory.mktemp("runs")
    shell = Shell(evaluate_tokens=128)
    recipe = Recipe(TINY, TrainConfig(batch_size=2, seq_len=32), HParams(), data=data, steps=1)
    train(recipe, run=folder / "base", shell=shell)
    objective = LanguageModeling(adapter=Adapter(rank=2))
    recipe = recipe.replace(objective=objective, start=weights(folder / "base"))
    train(recipe, run=folder / "lora", shell=shell)
    (folder / "base").rename(folder / "moved")
    return folder / "lora", folder / "moved"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_moved_base_is_asked_for_and_taken(command, places, data, tmp_path, monkeypatch):
    run, moved = places
    with pytest.raises(InputError, match=r"are not at .*base any more; give where they are with --base PATH"):
        COMMANDS[command](run, data, tmp_path / "out", None)
    with pytest.raises(InputError, match=r"needs no base; leave --base out|trains no adapter"):
        COMMANDS[command](moved, data, tmp_path / "out", run)

    def base_of(folder, record, given):
        raise RuntimeError(f"opens {given}")

    monkeypatch.setattr("model.runs._base_of", base_of)
    with pytest.raises(RuntimeError, match=f"opens {moved}"):
        COMMANDS[command](run, data, tmp_path / "out", moved)
    assert not (tmp_path / "out").exists()


def test_it_is_one_option():
    for command in (generate, evaluate, convert, merge, compress, decode):
        assert inspect.signature(command).parameters["base"].annotation == BasePath


def test_converted_with_its_moved_base(places, tmp_path):
    """The folder holds the base with the adapter; a GGUF or Hugging Face folder has no base to move."""
    run, moved = places
    convert(run, tmp_path / "out", base=moved)
    assert load_hf(tmp_path / "out")[0].d_model == TINY.d_model
    for wrong in (lambda: convert(tmp_path / "out", tmp_path / "more", base=moved),
                  lambda: open_parameters(tmp_path / "out", moved)):  # fmt: skip
        with pytest.raises(InputError, match="is no run, so that it has no base"):
            wrong()
