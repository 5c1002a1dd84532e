"""`isoflop model compress`: what it writes opens as the model it was made of, and the report measures what it says."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.commands.models.compress import _smaller
from experiments.compress import _score_cached, report
from experiments.models import need_tokenizer
from infer import prepare
from model import ModelConfig, apply
from model.convert import fold, save_hf
from model.store import Model, open_model
from model.tokenizer import load_tokenizer
from model.weights import Int4, bytes_of

CONFIG = ModelConfig(vocab_size=320, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=32)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
LLAMA = Path(__file__).parents[1] / "fixtures" / "hf" / "llama"


@pytest.mark.slow
def test_rounded_weights_come_back_as_they_were_stored(isoflop, tmp_path):
    code, out, _ = isoflop("model", "compress", LLAMA, tmp_path / "small", "--method", "int4")
    assert code == 0
    original, opened = open_model(LLAMA), open_model(tmp_path / "small")
    assert opened.config == original.config
    assert isinstance(opened.params["layers"][0]["feed_forward"]["down"]["weight"], Int4)
    expected = prepare(original.config, original.params, "int4")
    assert f"{bytes_of(expected):,} bytes" in out
    jax.tree.map(np.testing.assert_array_equal, opened.params, expected)
    code, _, err = isoflop("model", "compress", tmp_path / "small", tmp_path / "again")
    assert code == 2
    assert "rounded already" in err


@pytest.mark.slow
def test_a_pruned_model_is_a_hugging_face_folder_with_its_tokenizer(isoflop, tmp_path, data, random_params):
    save_hf(CONFIG, random_params(CONFIG), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    call = ("--method", "wanda", "--sparsity", 0.25, "--drop-layers", 1, "--data", data, "--seq-len", 16)
    code, _, _ = isoflop("model", "compress", tmp_path / "model", tmp_path / "small", *call)
    assert code == 0
    opened = open_model(tmp_path / "small")
    assert opened.config == CONFIG.replace(num_layers=2)
    weight = np.asarray(opened.params["layers"]["dense"]["feed_forward"]["up"]["weight"])
    assert ((weight == 0).sum(axis=1) == CONFIG.d_model // 4).all()
    assert need_tokenizer(opened.tokenizer, tmp_path / "small").vocab_size == 320


@pytest.mark.slow
def test_a_depth_scaled_model_loses_layers_too(data, random_params):
    config = CONFIG.replace(parameterization="mup", base_d_model=12, base_num_layers=2, tie_embeddings=False)
    opened = Model(config, random_params(config), load_tokenizer(data))
    smaller = lambda model: _smaller(model, "float32", 0.5, None, 1, data, 16)
    standard, params = smaller(opened)
    assert standard == CONFIG.replace(num_layers=2, tie_embeddings=False)
    # Multipliers have no part in the choice: it is that of the folded model.
    same = smaller(Model(*fold(config, opened.params), opened.tokenizer))[1]
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_text_is_asked_for_where_it_is_needed(isoflop, tmp_path):
    code, _, err = isoflop("model", "compress", LLAMA, tmp_path / "small", "--method", "wanda")
    assert code == 2
    assert "--data" in err
    assert not (tmp_path / "small").exists()


def test_loss_through_a_cache_is_that_without_one(random_params):
    params, inputs, targets = random_params(CONFIG), TOKENS[:, :-1], TOKENS[:, 1:]
    logits = np.asarray(jax.jit(apply, static_argnums=0)(CONFIG, params, inputs))
    nats, likeliest = _score_cached(CONFIG, params, inputs, targets, dtype="float32")
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats, np.log(np.exp(logits).sum(axis=-1)) - chosen, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(likeliest, logits.argmax(axis=-1))


@pytest.mark.long
def test_the_report_compares_forms_and_survives_one_that_fails(data, random_params, monkeypatch):
    import experiments.compress

    whole = experiments.compress.prepare
    refuse = lambda config, params, kind="float32": 1 / 0 if kind == "int4" else whole(config, params, kind)
    monkeypatch.setattr(experiments.compress, "prepare", refuse)
    rows = report(
        *(CONFIG, random_params(CONFIG), data),
        seq_len=16,
        max_tokens=100,
        decode_batches=(1,),
        only=("int8", "int4", "2 layers dropped", "int8 cache"),
    )
    by_form = {row["form"]: row for row in rows}
    assert list(by_form) == ["float32", "int8", "int4", "int8 cache", "2 layers dropped"]
    assert by_form["float32"]["agreement"] == 1
    assert by_form["float32"]["change_percent"] == 0
    assert "ZeroDivisionError" in by_form["int4"]["reason"]
    assert by_form["int8"]["agreement"] > 0.9 > by_form["2 layers dropped"]["agreement"]
    assert abs(by_form["int8"]["change_percent"]) < 2
    assert by_form["int8"]["weight_bytes"] < by_form["float32"]["weight_bytes"] / 2
    assert json.loads(json.dumps(rows)) == rows
    assert abs(by_form["int8 cache"]["change_percent"]) < 2


def test_the_tokenizer_of_a_gguf_file_goes_along_without_the_weights(tmp_path):
    import gguf

    from model.tokenizer import load_tokenizer
    from model.tokenizer.files import save_tokenizer

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "<end>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_tensor("token_embd.weight", np.ones((4, 4096), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = load_tokenizer(tmp_path / "model.gguf")
    (tmp_path / "small").mkdir()
    save_tokenizer(whole, tmp_path / "small")
    copied = load_tokenizer(tmp_path / "small")
    assert copied.path.stat().st_size < 4096
    assert copied.encode("abba") == whole.encode("abba") == [2, 1, 0]
    assert copied.eos_id == 3
