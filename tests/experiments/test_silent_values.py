"""No value that a person gives is dropped or cut without a word: it is refused, or what is used instead is said."""

import pytest

from experiments.commands import repeated, report, train
from experiments.commands.sweep import run as sweep_run
from experiments.sweep.definition import define
from experiments.sweep.run import begin, useful_workers
from model import presets
from train.data import load_manifest

FEW = ("--steps", 2, "--batch-size", 4, "--seq-len", 32)


REFUSED = {
    "train tiny --data d --out a --out b": "--out is given twice (a, b), and takes one value",
    "train tiny --out a --batch-size=4 --batch_size 8": "--batch-size is given twice (4, 8)",
    "eval run --data a --data b": "--data is given twice (a, b)",
    "sweep status a --json x --json y": "--json is given twice (x, y)",
    "scaling predict t --columns.loss a --columns.loss b": "--columns.loss is given twice (a, b)",
    "train tiny --seed 1 --set beta2=0.9 seed=2": "seed is given by --seed and by --set",
    "model show tiny --set num_layers=1 num_layers=2": "num_layers is given twice, as 1 and as 2",
    "model show tiny --set num_layers=1 --set num_layers=2": "given twice, as 1 and as 2",
    "sweep plan tiny --base beta2=0.9 --set beta2=0.8,0.9": "beta2 is given by --set and by --base",
    "generate r --prompt a --draft r --lookup 2": "--draft and --lookup are two ways",
    "report runs/a runs/a/": "a run is named twice",
    "cool trunk --at 3 3 --out o": "--at 3 3 has a step twice",
    "train tiny --keep-best a --out b --keep-best c": "--keep-best is given twice (a, c)",
}


SAID = {
    "generate r --prompt a --system s": "--system s does nothing without --chat",
    "generate r --prompt a --length-penalty 2": "--length-penalty 2.0 does nothing without --beams",
    "generate r --prompt a --tokens-ahead 2": "--tokens-ahead 2 does nothing without --draft or",
    "generate r --prompt a --beams 2 --top-k 5": "--top-k 5 does nothing with --beams",
    "bench decode nowhere --slots 2": "--slots 2 does nothing without --load",
    "bench decode nowhere --rounds 2": "--rounds 2 does nothing without --against",
    "bench train nowhere --rounds 2": "--rounds 2 does nothing without --against",
    "cool trunk --at 3 --out o --decay-steps 2 --decay-fraction 0.5": "does nothing with --decay",
    "bench decode nowhere --load 1 --prompt 4 8": "--load is of one kind of requests: of --prompt, the first value 4",
}


@pytest.mark.parametrize("call", SAID)
def test_a_flag_without_effect_is_said(call, isoflop):
    """The calls name no model, so that nothing is computed."""
    assert SAID[call] in isoflop(*call.split())[2]


@pytest.mark.parametrize("call", REFUSED)
def test_what_would_be_dropped_is_refused(call, isoflop):
    code, _, error = isoflop(*call.split())
    assert (code, REFUSED[call] in error) == (2, True), error
    assert len(error.strip().splitlines()) == 1


def test_the_values_of_a_repeated_list_are_all_taken():
    """The names of lists are read from the commands themselves, those of nested options too."""
    gathered = repeated.each_once(
        sweep_run.run, ["p", "--set", "a=1", "--seeds", "2", "--set", "b=1,2", "c=3", "--slurm-set", "x=1", "--data=d"]
    )
    assert gathered == ["p", "--set", "a=1", "b=1,2", "c=3", "--seeds", "2", "--slurm-set", "x=1", "--data", "d"]
    gathered = repeated.each_once(train.train, ["p", "--data=a=x", "--keep-best", "--keep_best", "--data", "b=y"])
    assert gathered == ["p", "--data", "a=x", "b=y", "--keep-best"]
    assert repeated.each_once(report.report, ["a", "b", "--out", "x"]) == ["a", "b", "--out", "x"]


def test_what_is_cut_is_said(data, tmp_path, isoflop):
    code, _, error = isoflop(
        *("train", "tiny", "--data", data, "--out", tmp_path / "run", *FEW, "--evaluate-tokens", 10**8),
        *("--keep-steps", 1, 90, "--keep-every", 50, "--set", "warmup_steps=30", "total_steps=1"),
    )
    assert code == 0, error
    there = load_manifest(data).splits["validation"].tokens - 1
    for sentence in (
        f"--evaluate-tokens 100,000,000 is more than the {there:,} tokens of the validation split; all",
        "--keep-steps 90: the run ends at step 2, before those checkpoints",
        "--keep-every 50 is more than the run's 2 steps",
        "warmup_steps=30 is more than the run's 2 steps",
        "total_steps=1 is fewer than the run's 2 steps",
    ):
        assert sentence in error
    code, _, error = isoflop("eval", tmp_path / "run", "--data", data, "--seq-len", 32, "--max-tokens", there + 1)
    assert f"--evaluate-tokens {there + 1:,} is more than the {there:,} tokens of the split; all were read" in error
    plan = ("sweep", "plan", "tiny", "--data", data, "--out", tmp_path / "s", *FEW, "--no-probe")
    rates = ("--set", "learning_rate=0.01,0.02", "warmup_steps=1,30")
    code, _, error = isoflop(*plan, *rates, "--sampler", "random", "--trials", 9, "--eval-tokens", there + 1)
    assert f"--evaluate-tokens {there + 1:,} is more than the {there:,} tokens" in error
    assert "--trials 9 is more than the 4 points of the space, each trained once" in error
    code, _, error = isoflop(*plan, *rates)
    assert (code, "warmup_steps=30 is more than 2 steps; 2 trials end below their rate" in error) == (0, True), error
    for flag, value, where in (
        ("--eta", 4.0, "with --policy all"),
        ("--quantile", 0.5, "with --policy all"),
        ("--sampler-seed", 3, "without --sampler"),
    ):
        code, _, error = isoflop(*plan, *rates, flag, value)
        assert (code, f"{flag} {value} does nothing {where}" in error) == (0, True), error
    code, _, error = isoflop("data", "inspect", data, "--split", "validation", "--rows", 10**7)
    assert "--rows 10,000,000 is more than" in error


def test_a_run_that_stops_early_says_why(data, tmp_path, isoflop):
    arguments = ("train", "tiny", "--data", data, "--out", tmp_path / "run", "--batch-size", 4, "--seq-len", 32)
    few = (*arguments, "--steps", 6, "--evaluate-tokens", 512, "--learning-rate", 0, "--evaluate-every", 1)
    code, out, error = isoflop(*few, "--keep-best", "validation_perplexity", "--patience", 2)
    assert code == 0, error
    assert "finished after 3 steps" in out
    assert "stopped early at step 3 of 6: validation_perplexity has not improved on" in out
    assert "(step 1) in 2 validations" in out
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "3"]
    code, out, error = isoflop(*few, "--patience", 6, "--keep-best")
    assert (code, "finished after 6 steps" in out, "stopped early" in out) == (0, True, False), error
    assert "--patience 6 is as many validations as the run has, or more; it cannot stop early" in error
    code, _, error = isoflop(*few, "--keep-best", "validation_loss", "train_loss")
    assert (code, "takes one metric at most" in error) == (2, True), error


def test_more_workers_than_trials_are_not_started(data, tmp_path, caplog):
    config = presets.get("tiny").replace(num_layers=1)
    sweep = define(config, data=data, folder=tmp_path / "s", steps=2, seq_len=32, axes=["learning_rate=0.01,0.02"])
    ledger = begin(sweep)
    assert useful_workers(sweep, ledger, 2) == 2
    assert not caplog.messages
    assert useful_workers(sweep, ledger, 5) == 2
    assert caplog.messages == ["isoflop: 5 workers are more than the 2 trials that are left; 2 are started"]
