"""Checkpoints are verified before they are believed."""

from types import SimpleNamespace

import numpy as np
import pytest

from train.checkpoint import CHECKSUMS, Checkpoints, verify

STATE = {"weights": np.arange(5000, dtype=np.float32), "step": np.array(3, np.int32)}


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {**STATE, "step": np.array(step, np.int32)})
    checkpoints.close()
    return tmp_path


def test_round_trip_and_keep(saved):
    checkpoints = Checkpoints(saved)
    step, state = checkpoints.restore_newest(STATE)
    assert step == 2
    assert state["step"] == 2
    np.testing.assert_array_equal(state["weights"], STATE["weights"])
    for step in (3, 4):
        checkpoints.save(step, STATE)
    checkpoints.close()
    assert checkpoints.steps() == [3, 4]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_noticed_and_costs_that_checkpoint_only(saved, damage, caplog):
    newest = saved / "checkpoints" / "2"
    for path in files(newest):
        content = path.read_bytes()
        if damage == "flip":
            changed = bytearray(content)
            changed[len(content) // 2] ^= 16
            path.write_bytes(bytes(changed))
        elif damage == "truncate":
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        assert verify(newest) is not None, path
        path.write_bytes(content)
        assert verify(newest) is None
    victim = files(newest)[0]
    victim.write_bytes(b"")
    step, state = Checkpoints(saved).restore_newest(STATE)
    assert step == 1
    assert state["step"] == 1
    assert str(newest) in caplog.text
    assert not newest.exists()


def test_unfinished_checkpoint_is_skipped(saved):
    (saved / "checkpoints" / "2" / CHECKSUMS).unlink()
    assert Checkpoints(saved).restore_newest(STATE)[0] == 1


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore_newest(STATE) is None


def test_failed_save_is_raised(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE)
    checkpoints.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.write_json", full)
    checkpoints.save(2, STATE)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    checkpoints.close()
    assert Checkpoints(tmp_path).restore_newest(STATE)[0] == 1


def test_a_full_disk_is_noticed_before_anything_is_written(saved, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20_000))
    checkpoints = Checkpoints(saved)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(3, STATE)
    checkpoints.close()
    assert Checkpoints(saved).restore_newest(STATE)[0] == 2
