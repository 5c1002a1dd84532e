"""The run directory: what is refused, what is kept."""

import fcntl
import json

import pytest

from model import InputError, presets
from train import HParams, Shell, TrainConfig, load_run, train
from train.run import BusyError, read_record
from train.run.metrics import MetricsLog, open_metrics, read_metrics

CONFIG = presets.get("tiny").replace(vocab_size=320, max_seq_len=32, num_layers=1)
TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=32, norms=False)
QUIET = Shell(evaluate_tokens=512)


def go(data, run, steps=4, config=CONFIG, train_config=TRAIN_CONFIG, **hparams):
    return train(config, train_config, HParams(**hparams), data=data, run=run, steps=steps, shell=QUIET)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    go(data, run)
    return run


def test_record(finished, data):
    record = read_record(finished)
    assert record["status"] == "finished"
    assert record["step"] == 4
    assert record["identity"]["config"]["d_model"] == CONFIG.d_model
    assert record["versions"]["jax"]
    assert record["result"]["validation_loss"] == read_metrics(finished)[-1]["validation_loss"]
    assert list((finished / "tensorboard").iterdir())
    config, params = load_run(finished)
    assert config == CONFIG
    assert params["embedding"]["tokens"].shape == (320, 16)


def test_a_finished_run_is_not_trained_again(finished, data):
    kept = lambda: {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in finished.rglob("metrics.jsonl")}
    before = kept()
    result = go(data, finished)
    assert (result.status, result.steps) == ("finished", 4)
    assert result.validation_loss == read_record(finished)["result"]["validation_loss"]
    assert kept() == before


def test_another_configuration_is_refused_with_the_difference(finished, data):
    before = (finished / "run.json").read_bytes()
    with pytest.raises(InputError, match=r"learning_rate=0\.003 there, 0\.01 here"):
        go(data, finished, learning_rate=1e-2)
    with pytest.raises(InputError, match="num_layers=1 there, 3 here"):
        go(data, finished, config=CONFIG.replace(num_layers=3))
    with pytest.raises(InputError, match="total_steps=4 there, 9 here"):
        go(data, finished, steps=9)
    assert (finished / "run.json").read_bytes() == before


def test_a_constant_schedule_goes_on_for_longer(data, tmp_path):
    constant = TRAIN_CONFIG.replace(schedule="constant")
    go(data, tmp_path / "long", steps=6, train_config=constant)
    go(data, tmp_path / "short", steps=3, train_config=constant)
    assert go(data, tmp_path / "short", steps=6, train_config=constant).steps == 6
    long, short = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("long", "short"))
    assert long == short


def test_segmented_documents_train(data, tmp_path):
    result = go(data, tmp_path / "run", train_config=TRAIN_CONFIG.replace(segment_documents=True))
    assert result.status == "finished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_config": TRAIN_CONFIG.replace(seq_len=64)}, "seq_len=64 is longer than the model's context"),
        ({"config": CONFIG.replace(vocab_size=100)}, r"vocabulary of data \(320\) exceeds .* vocab_size=100"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"train_config": TrainConfig(seq_len=32, batch_size=4), "config": CONFIG, "run_is_file": True}, "is a file"),
        ({"not_a_run": True}, "is not empty and has no run.json"),
    ],
)
def test_bad_input_writes_nothing(data, tmp_path, change, message):
    run = tmp_path / "run"
    if change.pop("run_is_file", False):
        run.write_text("here")
    if change.pop("not_a_run", False):
        run.mkdir()
        (run / "mine.txt").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        go(data, run, **change)
    assert sorted(tmp_path.rglob("*")) == before


def test_second_process_is_refused(data, tmp_path):
    go(data, tmp_path / "run")
    with open(tmp_path / "run" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="being written by another process"):
            go(data, tmp_path / "run")


def test_damaged_record_is_one_sentence(tmp_path):
    (tmp_path / "run.json").write_text('{"schema_version": 1')
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path)


def test_metrics_are_cut_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
    line = lambda step, loss: {"step": step, "tokens": 64 * step, "flops_6nd": 1e6 * step, "loss": loss}
    lines = [json.dumps(line(step, 1.0)) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, open_metrics(tmp_path).up_to(2), tensorboard_every=100)
    log.write(line(3, 2.0))
    log.close()
    assert read_metrics(tmp_path) == [line(1, 1.0), line(2, 1.0), line(3, 2.0)]
