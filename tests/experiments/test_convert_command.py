"""What is converted can be used by itself: its tokenizer goes along."""

import json
import shutil

import numpy as np
import pytest

from experiments.commands.models.convert import convert
from model import InputError, presets
from model.convert import save_hf
from model.quantized import save_quantized
from model.store import open_model


@pytest.fixture
def model(random_params):
    config = presets.get("tiny").replace(vocab_size=320)
    return config, random_params(config)


def test_a_run_becomes_a_folder_with_its_tokenizer(model, data, tmp_path, monkeypatch):
    config, params = model
    monkeypatch.setattr("model.runs.load_run", lambda folder: (config, params))
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"schema_version": 1, "data": str(data)}))
    convert(run, tmp_path / "hf")
    found = open_model(tmp_path / "hf")
    text = "The people of the United States"
    assert found.tokenizer.encode(text) == open_model(tmp_path / "hf", data).tokenizer.encode(text)
    np.testing.assert_array_equal(found.params["embedding"]["tokens"], params["embedding"]["tokens"])


def test_rounded_weights_are_refused(model, tmp_path):
    save_quantized(*model, tmp_path / "small", "int8")
    with pytest.raises(InputError, match="small holds rounded weights; give the model that it was made of"):
        convert(tmp_path / "small", tmp_path / "hf")


def test_a_folder_keeps_its_tokenizer(model, data, tmp_path):
    save_hf(*model, tmp_path / "one")
    shutil.copy(data / "tokenizer.model", tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
