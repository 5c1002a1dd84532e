"""What is checked before a server loads its models, and how it ends."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from infer.serve.run import Loading, address, check_memory, check_reachable, listen, serve
from infer.serve.settings import Settings
from model import ModelConfig
from model.errors import InputError

CONFIG = ModelConfig(vocab_size=1000, d_model=512, num_layers=8, num_heads=8, d_ff=2048, max_seq_len=2048)


def test_other_machines_need_a_key():
    check_reachable("127.0.0.1", Settings(), False)
    check_reachable("::1", Settings(), False)
    check_reachable("0.0.0.0", Settings(api_keys=("k",)), False)
    check_reachable("0.0.0.0", Settings(), True)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(InputError, match="--api-key KEY, or --open"):
            check_reachable(host, Settings(), False)


def test_models_must_fit_the_memory():
    need = Loading(slots=4, capacity=1024)
    check_memory({"a": CONFIG}, need, free=2**30)
    with pytest.raises(InputError, match=r"a does not fit the memory: it takes .* GiB .*4 slots of 1,024 tokens"):
        check_memory({"a": CONFIG}, need, free=2**26)
    with pytest.raises(InputError, match="second does not fit"):
        check_memory({"first": CONFIG, "second=x": CONFIG.replace(num_layers=9)}, need, free=2**29)


def test_a_port_in_use_is_named():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address(first, "localhost") == f"http://localhost:{port}"
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match="is it an address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(InputError, match="is no address"):
        listen("no such host", 0)
    with socket.socket() as plain, pytest.raises(InputError, match="is no address"):
        listen(f"{plain.family}.invalid", 99999999)


LLAMA = Path(__file__).parents[2] / "fixtures" / "hf" / "llama"  # which has no tokenizer


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "there is no model to serve"),
        (["nowhere"], {}, "there is no model at nowhere; give a run directory, a Hugging Face folder or a GGUF file"),
        ([LLAMA.parent], {}, "is not a model: give a run directory"),
        ([LLAMA, f"llama={LLAMA}"], {}, "two models have the name 'llama'"),
        ([LLAMA], {"slots": 0}, "slots=0 must be a whole number of at least 1"),
        ([LLAMA], {"capacity": -1}, "capacity=-1 must be"),
        ([LLAMA], {"steps": 10**6}, "steps=1000000 must be a whole number from 1 to"),
        ([LLAMA], {"most_waiting": -1}, "most_waiting=-1 must be"),
        ([LLAMA], {"tokenizer": Path("nowhere")}, "there is no tokenizer at nowhere"),
        ([LLAMA], {"chat_template": "nothing"}, "there is no chat template nothing; .* chatml, hermes"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_loaded(monkeypatch, models, options, message):
    monkeypatch.setattr(Loading, "open", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(InputError, match=message):
        serve(list(map(str, models)), port=0, loading=Loading(**options))


def test_a_model_larger_than_the_memory_is_not_loaded(tmp_path, monkeypatch):
    config = json.loads((LLAMA / "config.json").read_text())
    large = {"hidden_size": 65536, "intermediate_size": 2**18, "num_hidden_layers": 200, "vocab_size": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config | large))
    monkeypatch.setattr(Loading, "open", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(InputError, match=r"does not fit the memory: it takes .* GiB .* are free; give fewer --slots"):
        serve([str(tmp_path)], port=0)


def test_a_broken_model_is_one_sentence(tmp_path):
    half = tmp_path / "half.gguf"
    half.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(500))
    cut = shutil.copytree(LLAMA, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    for path, message in ((half, "half.gguf .*"), (cut.parent, "model.safetensors is cut off")):
        with pytest.raises(InputError, match=message) as raised:
            serve([str(path)], port=0)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="has no tokenizer, so it has no use for a chat template; give --tokenizer"):
        serve([str(LLAMA)], port=0, loading=Loading(chat_template="chatml"))
