"""`isoflop model coordcheck` and `transfer`: what they measure is what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.coordcheck import DEFAULT, coordinate_check, growth, judge, places, random_batch, resize
from experiments.transfer import learning_rate_transfer
from model import Experts, InputError, forward
from train import HParams, TrainConfig, init_state, train_step

SMALL = DEFAULT.replace(d_model=16, num_heads=2, num_layers=2, vocab_size=32, max_seq_len=8)


@pytest.fixture(scope="module")
def check():
    return coordinate_check(SMALL, (32, 8), steps=2, learning_rate=0.01, seeds=(0, 1), parameterizations=("mup",))


def test_a_row_for_every_size_and_parameterization(check, monkeypatch):
    monkeypatch.setattr("experiments.coordcheck.trajectory", lambda *_: {"scale": 0, "change": 0, "loss": 0})
    rows = coordinate_check(SMALL, (32, 8), steps=2)["table"]
    assert [(row["parameterization"], row["size"]) for row in rows] == [
        ("standard", 8), ("standard", 32), ("mup", 8), ("mup", 32),
    ]  # fmt: skip
    for row in check["table"]:
        assert row["places"] == ["embedding", "layer 1 of 2", "last layer", "final hidden", "logits"]
        for name in ("scale", "change"):
            assert np.shape(row[name]) == (2, 3, 5)
        assert np.shape(row["loss"]) == (2, 2)
        assert not np.array(row["change"])[:, 0].any()


def test_numbers_are_those_of_training_by_hand(check):
    made = resize(SMALL, "width", 32, 8, "mup").replace(zero_readout=True)
    train_config = TrainConfig(batch_size=4, seq_len=8, schedule="constant")
    hparams = HParams(learning_rate=0.01, weight_decay=0.0, clip_norm=0.0, seed=1)
    batch = random_batch(SMALL)
    state = jax.jit(init_state, static_argnums=(0, 1))(made, train_config, hparams)
    params = jax.tree.map(jnp.copy, state.params)
    for _ in range(2):  # donated as there, so that it is one program
        state, _ = jax.jit(train_step, static_argnums=(0, 1), donate_argnums=2)(
            made, train_config, state, batch, hparams
        )
    tokens = jnp.asarray(batch["tokens"])
    outputs = jax.jit(lambda params: forward(made, params, tokens, outputs=("hidden",)))
    before, after = outputs(params), outputs(state.params)
    row = check["table"][1]
    size = lambda array: float(np.sqrt(np.mean(np.square(array))))
    assert row["scale"][1][2][1] == pytest.approx(size(after.hidden[1]), rel=1e-4)
    assert row["change"][1][2][2] == pytest.approx(size(after.hidden[2] - before.hidden[2]), rel=1e-4)
    assert row["change"][1][2][4] == pytest.approx(size(after.logits - before.logits), rel=1e-4)


def test_growth_and_verdict_of_a_known_table(check):
    rows = [
        {"parameterization": "standard", "size": size, "places": places(SMALL), "scale": [[[1.0] * 5] * 3] * 2}
        | {"change": [[[0.0] * 5, [0.0] * 5, [1.0, factor, 1.0, 1.0, 1.0]]] * 2}
        for size, factor in ((8, 2.0), (32, 10.0))
    ]
    known = check | {"table": rows}
    assert growth(known, "standard", "change")["layer 1 of 2"] == pytest.approx(5.0)
    assert growth(known, "standard", "scale")["layer 1 of 2"] == pytest.approx(1.0)
    assert judge(known, "standard") == {"holds": False, "place": "layer 1 of 2", "growth": pytest.approx(5.0)}
    rows[1]["change"][0][2] = rows[1]["change"][1][2] = [0.4, 2.0, 1.0, 1.0, 1.0]
    assert judge(known, "standard") == {"holds": False, "place": "embedding", "growth": pytest.approx(0.4)}
    rows[1]["change"][0][2] = rows[1]["change"][1][2] = [0.9, 3.0, 1.0, 1.0, 1.0]
    assert judge(known, "standard") == {"holds": True, "place": "layer 1 of 2", "growth": pytest.approx(1.5)}


@pytest.mark.long
def test_mup_keeps_what_standard_does_not():
    check = coordinate_check(SMALL, (16, 256), steps=3, learning_rate=0.01, seeds=(0,))
    assert judge(check, "mup")["holds"]
    assert judge(check, "standard")["growth"] > 4


def test_resizing_keeps_heads_and_proportions():
    grouped = SMALL.replace(num_heads=4, num_kv_heads=2, head_dim=4, experts=Experts(count=4, top_k=1, d_ff=8))
    wide = resize(grouped, "width", 64, 16, "mup")
    assert (wide.num_heads, wide.num_kv_heads, wide.head_dim) == (16, 8, 4)
    assert wide.d_ff == 4 * grouped.d_ff
    assert wide.experts.d_ff == 32
    assert (wide.base_d_model, wide.base_num_layers) == (16, None)
    deep = resize(SMALL, "depth", 8, 2, "mup")
    assert (deep.num_layers, deep.d_model, deep.base_d_model, deep.base_num_layers) == (8, 16, 16, 2)
    with pytest.raises(InputError, match="num_heads"):
        resize(SMALL, "width", 20, 16)


def test_the_command_prints_a_verdict_and_writes_everything(isoflop, tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL.to_dict()))
    call = ("model", "coordcheck", file, "--widths", 8, 32, "--steps", 1, "--seeds", 1)
    code, out, error = isoflop(*call, "--parameterization", "mup", "--out", tmp_path / "out")
    assert code == 0, error
    assert "last layer" in out
    assert "from d_model 8 to 32" in out
    document = json.loads((tmp_path / "out" / "coordcheck.json").read_text())
    assert document["schema_version"] == 1
    assert {"axis", "sizes", "steps", "learning_rate", "seeds", "optimizer", "config", "table"} < set(document)
    assert set(document["growth"]["mup"]) == {"scale", "change"}
    assert set(document["verdict"]["mup"]) == {"holds", "place", "growth"}
    assert (tmp_path / "out" / "coordcheck.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--widths", 64), "two different"),
        (("--widths", 64, 100), "num_heads"),
        (("--steps", 0), "--steps=0"),
        (("t5-small",), "language model"),
    ],
)
def test_a_wrong_call_is_one_sentence(isoflop, arguments, word):
    code, out, error = isoflop("model", "coordcheck", *arguments)
    assert code == 2
    assert not out
    assert word in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.long
def test_transfer_sweeps_every_width_and_finds_the_best_rate(data, tmp_path):
    arguments = {
        "train_config": TrainConfig(batch_size=2, seq_len=8),
        "base": HParams(),
        "steps": 2,
        "seeds": (0, 1),
        "data": data,
        "folder": tmp_path,
        "parameterizations": ("mup",),
        "evaluate_tokens": 64,
    }
    config = SMALL.replace(vocab_size=320)
    found = learning_rate_transfer(config, (16, 8), (1e-5, 1e-1, 1e-3), **arguments)
    assert [cell["width"] for cell in found["cells"]] == [8, 16]
    for cell in found["cells"]:
        means = {row["learning_rate"]: row["mean"] for row in cell["settings"]}
        assert cell["winner"]["setting"]["learning_rate"] == min(means, key=means.get)
        assert len(cell["optimum_per_seed"]) == 2
    best = [cell["winner"]["setting"]["learning_rate"] for cell in found["cells"]]
    assert found["spread"] == {"mup": max(best) / min(best)}
    with pytest.raises(InputError, match="three learning rates"):
        learning_rate_transfer(config, (16, 8), (1e-3, 1e-2), **arguments)
