"""From a GGUF file's tokenizer to a model's folder: every command takes it for the same."""

import json

import gguf
import pytest
from tokenizers import pre_tokenizers

from model.tokenizer import load_tokenizer
from train.data import gives_ids_of

CONFIG = {"vocab_size": 264, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "max_seq_len": 64}
CALL = ("--steps", 1, "--batch-size", 2, "--seq-len", 16, "--evaluate-tokens", 64)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A GGUF file of a byte-level tokenizer whose end token is its second one."""
    file = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    tokens = ["<|begin|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


@pytest.mark.slow
def test_from_a_gguf_vocabulary_to_a_folder(isoflop, corpus, vocabulary, tmp_path):
    data, run, folder, preset = (tmp_path / name for name in ("data", "run", "hf", "tiny.json"))
    preset.write_text(json.dumps(CONFIG))

    def call(*arguments):
        code, out, err = isoflop(*arguments)
        assert code == 0, err
        return out

    prepare = ("data", "prepare", corpus, "--out", data, "--validation-fraction", 0.2, "--tokenizer")
    made = call(*prepare, vocabulary)
    call("train", preset, "--data", data, "--out", run, *CALL)
    call("model", "convert", run, folder)
    assert call(*prepare, run) == made, "the run's tokenizer is the data's"
    assert "the" in call("generate", folder, "--prompt", "the", "--max-new-tokens", 2)
    losses = []
    for model in (run, folder):
        call("eval", model, "--data", data, "--seq-len", 16, "--evaluate-tokens", 64, "--json", tmp_path / "loss.json")
        losses.append(json.loads((tmp_path / "loss.json").read_text()))
    assert losses[0]["bytes"] == losses[1]["bytes"]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], abs=1e-5)

    first, last = load_tokenizer(vocabulary), load_tokenizer(folder)
    assert last.path.name == "tokenizer.json"
    text = "the people, 1789 <|end|>\n"
    for special in (False, True):
        assert first.encode(text, special=special) == last.encode(text, special=special)
    assert first.eos_ids == last.eos_ids == (1,)
    assert last.apply_chat_template([{"role": "user", "content": "the"}]) == "<|begin|>the<|end|>"
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert (named["eos_token"], named["bos_token"], named["add_bos_token"]) == ("<|end|>", None, False)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1

    assert gives_ids_of(last, data)
    code, _, err = isoflop("train", folder, "--data", _other(isoflop, corpus, tmp_path), "--out", tmp_path / "x", *CALL)
    assert code != 0
    assert "the data were prepared with another tokenizer" in err


def _other(isoflop, corpus, tmp_path):
    call = ("--out", tmp_path / "other", "--vocab-size", 264, "--validation-fraction", 0.2)
    assert isoflop("data", "prepare", corpus, *call)[0] == 0
    return tmp_path / "other"
