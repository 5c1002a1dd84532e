"""`isoflop model show --mesh`: the bytes are those of the books, cut as the sharding says."""

import json

import pytest

from experiments.commands.models.holdings import holdings
from model import accounting, presets
from model.sharding import AXES


def test_one_device_holds_everything():
    for name in ("tiny", "mixtral-8x7b", "t5-base", "bert-base"):
        config = presets.get(name)
        held = holdings(config, {})
        total = 4 * accounting.parameters(config).total
        assert held["devices"] == held["total"]["copies"] == 1
        assert held["total"]["parameter_bytes"] == held["total"]["parameter_bytes_per_device"] == total
        assert held["total"]["adam_bytes_per_device"] == 2 * total


@pytest.mark.parametrize("name", ["mt-nlg-530b", "deepseek-v2-lite", "t5-base"])
def test_groups_add_up_and_devices_hold_all(name):
    held = holdings(presets.get(name), {"data": 2, "fsdp": 16, "expert": 4, "tensor": 8})
    assert held["devices"] == 2 * 16 * 4 * 8
    for key in ("parameter_bytes", "parameter_bytes_per_device", "adam_bytes_per_device"):
        assert sum(group[key] for group in held["groups"].values()) == held["total"][key]
    for group in (*held["groups"].values(), held["total"]):
        assert group["copies"] >= 2  # data repeats all
        assert group["copies"] * group["parameter_bytes"] == pytest.approx(
            group["parameter_bytes_per_device"] * held["devices"]
        )


def test_fsdp_over_eight_leaves_an_eighth():
    held = holdings(presets.get("gpt2-small"), {"fsdp": 8})["total"]
    assert held["parameter_bytes_per_device"] <= (1 / 8 + 0.05) * held["parameter_bytes"]


def test_the_table_says_how_the_largest_is_split(isoflop, tmp_path):
    mesh = ("--mesh", "fsdp=4,expert=8")
    code, out, error = isoflop("model", "show", "mixtral-8x7b", *mesh, "--json", tmp_path / "show.json")
    assert code == 0, error
    rows = {line.split("  ")[0]: line for line in out[out.index("training on fsdp=4, expert=8") :].splitlines()}
    assert "32 × 8/expert 8 × " in rows["experts"]
    assert "4,096/fsdp 4" in rows["experts"]
    document = json.loads((tmp_path / "show.json").read_text())["mesh"]
    assert document["axes"] == {**dict.fromkeys(AXES, 1), "fsdp": 4, "expert": 8}
    assert document["groups"]["experts"]["copies"] == 1
    assert sum(leaf["bytes"] for leaf in document["parameters"]) == document["total"]["parameter_bytes"]
