"""A run that holds only what it trained: commands find its base with --base where it was moved, and say what it is."""

import inspect
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from experiments.commands.bench.decode import decode
from experiments.commands.evaluate import evaluate
from experiments.commands.generate import generate
from experiments.commands.models.compress import compress
from experiments.commands.models.convert import convert
from experiments.commands.models.merge import merge
from experiments.commands.models.show import show
from experiments.commands.options import BasePath
from experiments.models import started_from
from experiments.runs.report import write_run_page
from experiments.runs.started import in_words, started_from_weights
from model import InputError, accounting, presets
from model.adapters import Adapter
from model.convert import load_hf
from model.runs import UNSEALED, data_folder, load_adapter
from model.store import open_parameters
from model.tokenizer import load_tokenizer
from model.weights import count_of
from train import HParams, Recipe, Shell, TrainConfig, train, weights
from train.checksums import write_sealed
from train.objectives import LanguageModeling
from train.run import read_record

TINY = presets.get("tiny").replace(num_layers=1, max_seq_len=32, d_ff=48, vocab_size=320)
COMMANDS = {
    "generate": lambda run, data, out, base: generate(run, prompt=("a",), base=base),
    "eval": lambda run, data, out, base: evaluate((run,), data=data, base=base),
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


def test_the_moved_base_of_a_base_is_taken(places, data, tmp_path):
    """A run over a run that holds only what it trained: --base is for whichever of them lost its own."""
    run, moved = places
    recipe = Recipe(TINY, TrainConfig(batch_size=2, seq_len=32), HParams(), data=data, steps=1)
    moved.rename(moved.with_name("base"))
    try:
        whole = open_parameters(run)[1]
        objective = LanguageModeling(trainable=("final_norm",))
        train(recipe.replace(objective=objective, start=weights(run)), run=tmp_path / "norm", shell=Shell())
        expected = open_parameters(tmp_path / "norm")[1]
    finally:
        moved.with_name("base").rename(moved)
    with pytest.raises(InputError, match=rf"write the whole model with `isoflop model convert {run} OUT --base PATH`"):
        open_parameters(tmp_path / "norm")
    for target in (run, moved.with_name("base")):
        with pytest.raises(InputError, match=f"{target} holds weights that {tmp_path}/norm needs"):
            convert(tmp_path / "norm", target)
    jax.tree.map(np.testing.assert_array_equal, open_parameters(tmp_path / "norm", moved)[1], expected)
    convert(run, tmp_path / "whole", base=moved)
    jax.tree.map(np.testing.assert_array_equal, open_parameters(tmp_path / "whole")[1], whole)
    jax.tree.map(np.testing.assert_array_equal, open_parameters(tmp_path / "norm", tmp_path / "whole")[1], expected)


def test_it_is_one_option():
    for command in (generate, evaluate, convert, merge, compress, decode):
        assert inspect.signature(command).parameters["base"].annotation == BasePath


def test_converted_with_its_moved_base(places, data, tmp_path, capsys):
    """The folder holds the base with the adapter; a GGUF or Hugging Face folder has no base to move."""
    run, moved = places
    convert(run, tmp_path / "out", base=moved)
    assert load_hf(tmp_path / "out")[0].d_model == TINY.d_model
    for wrong in (lambda: convert(tmp_path / "out", tmp_path / "more", base=moved),
                  lambda: open_parameters(tmp_path / "out", moved)):  # fmt: skip
        with pytest.raises(InputError, match="is not a run and has no base"):
            wrong()
    merge(run, tmp_path / "adapter", adapter_only=True)
    for here, at in ((tmp_path / "out", None), (run, moved)):
        target = at or here
        with pytest.raises(InputError, match=f"{target} holds weights that {here} needs; give another folder"):
            merge(here, target, adapter=tmp_path / "adapter", base=at)
    started_from(tmp_path / "out", data)
    assert not capsys.readouterr().err
    (tmp_path / "out" / "tokenizer.model").unlink()
    started_from(tmp_path / "out", data)
    assert f"{tmp_path / 'out'} has no tokenizer" in capsys.readouterr().err
    merge(tmp_path / "out", tmp_path / "kept", adapter=tmp_path / "adapter")
    (tmp_path / "kept" / "tokenizer.model").touch()
    assert "keeps" not in capsys.readouterr().err
    merge(tmp_path / "out", tmp_path / "kept", adapter=tmp_path / "adapter")
    assert f"{tmp_path / 'kept'} keeps the tokenizer.model that it had" in capsys.readouterr().err
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "out" / name
        values = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in values.items() if key != "eos_token_id"}))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "out" / "tokenizer.json"))
    with pytest.raises(InputError, match=r"has no end token.*name it as eos_token in a tokenizer_config"):
        started_from(tmp_path / "out", data)


def test_other_data_in_the_place_of_a_runs_own_are_said(places, data, tmp_path, caplog):
    """The tokenizer of a run is that of its data folder, which may have been prepared again with another one."""
    run, moved = places
    assert load_tokenizer(moved).path.parent == data_folder(run)
    assert not caplog.records
    shutil.copytree(moved, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    record = read_record(tmp_path / "run")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"hash": "0"}))
    write_sealed(tmp_path / "run" / "run.json", record | {"data": str(tmp_path / "data")}, UNSEALED)
    assert data_folder(tmp_path / "run") == tmp_path / "data"
    assert "holds other data now" in caplog.text


def test_what_a_run_started_from_is_said_wherever_it_is_shown(places, tmp_path, capsys):
    """Its base by hash and place, the adapter, and how much is trained; the base itself need not be there."""
    run, moved = places
    record = read_record(run)
    started = started_from_weights(run, record)
    assert (started["sha256"], started["path"]) == (weights(moved).sha256, str(moved.with_name("base")))
    targets = ["query", "key", "value", "output", "up", "gate", "down"]
    assert started["adapter"] == {"rank": 2, "alpha": 8.0, "targets": targets}
    held = count_of(load_adapter(run)[2])
    assert started["trained"] == {"parameters": held, "bytes": 4 * held}
    total = accounting.parameters(TINY).total
    assert started["frozen"] == {"parameters": total, "bytes": 4 * total}
    sentence = in_words(started)
    start = f"started from weights {started['sha256'][:16]}… of {moved.with_name('base')}"
    assert sentence.startswith(f"{start}; trains a low-rank adapter (rank 2, alpha 8) of query, key")
    assert write_run_page(tmp_path / "page.html", [run, moved])[1]["started"] is None
    assert started["sha256"][:16] in (tmp_path / "page.html").read_text()
    show(str(run), json=tmp_path / "show.json")
    assert sentence in capsys.readouterr().out
    shown = json.loads((tmp_path / "show.json").read_text())
    assert shown["started"] == started
    assert shown["training_bytes"]["frozen parameters"] == 4 * total
    per_token = LanguageModeling(adapter=Adapter(rank=2)).flops_per_token(TINY, 32)
    assert shown["flops_per_token"]["training FLOPs per token (exact)"] == per_token


def test_a_lane_a_chosen_part_and_a_rounded_base_are_said(places):
    """A lane has its own rank; a part is named by its prefixes; frozen bytes are those of the form that is held."""
    run, _ = places
    record = read_record(run)
    lane = started_from_weights(run, record | {"hparams": record["hparams"] | {"lora_rank": 1}})
    assert lane["adapter"]["rank"] == 1
    assert 2 * lane["trained"]["parameters"] == started_from_weights(run, record)["trained"]["parameters"]
    part = {"name": "language-modeling", "trainable": ["final_norm"]}
    said = started_from_weights(run, record | {"identity": record["identity"] | {"objective": part}})
    assert said["trained"]["parameters"] + said["frozen"]["parameters"] == accounting.parameters(TINY).total
    assert "trains final_norm: " in in_words(said)
    rounded = record["identity"]["objective"] | {"base_weights": "int4"}
    said = started_from_weights(run, record | {"identity": record["identity"] | {"objective": rounded}})
    assert said["frozen"]["parameters"] == accounting.parameters(TINY).total
    assert said["frozen"]["bytes"] < 4 * said["frozen"]["parameters"]
    assert "frozen in int4: " in in_words(said)
