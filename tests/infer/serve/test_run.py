"""What is checked before a server loads its models, and how it ends."""

import socket

import pytest

from infer.serve.run import Loading, address, check_memory, check_reachable, listen
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
