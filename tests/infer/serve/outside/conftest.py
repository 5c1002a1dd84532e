"""One server for all cases: `isoflop serve` of SmolLM2, and llama-server of the same file where it was built.

    ISOFLOP_PEER_SERVER=/path/to/llama-server pytest tests/infer/serve/outside

Every case then runs against both. A case that fails against the peer is reported as expected to fail; it must pass
against isoflop whether or not the peer passes. Fixtures: `server` for cases of both, `ours` for cases of isoflop only.
"""

import os
import shutil

import pytest
import servers

from model.convert import save_hf


def pytest_collection_modifyitems(items):
    """All of this takes minutes."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.long)


def pytest_generate_tests(metafunc):
    """Run the cases of `server`, `embedder` and `tooled` against each server there is."""
    for name in {"server", "embedder", "tooled"} & set(metafunc.fixturenames):
        both = ["isoflop"]
        if servers.PEER in os.environ:
            both.append(pytest.param("peer", marks=pytest.mark.xfail(reason="llama-server behaves differently")))
        metafunc.parametrize(name, both, indirect=True, scope="session")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where servers write."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def ours(folder):
    """`isoflop serve` of SmolLM2: 4 slots of 1,024 tokens."""
    if servers.RUNNING in os.environ:
        yield servers.Server(None, int(os.environ[servers.RUNNING]))
        return
    with servers.isoflop_server(servers.smollm2(), folder, "--slots", 4, "--capacity", 1024) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tokenizer, model_config, random_params, tmp_path_factory):
    """A tiny random model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    config = model_config.replace(max_seq_len=512)
    save_hf(config, random_params(config, seed=1), folder)
    for file in tokenizer.path.parent.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def peer(folder):
    """llama-server of the same file: 4 slots of 1,024 tokens."""
    options = ("--parallel", 4, "--ctx-size", 4096, "--metrics", "--no-kv-unified")
    with servers.peer_server(servers.smollm2(), folder, *options) as server:
        yield server


@pytest.fixture(scope="session")
def peer_embedder(folder):
    """llama-server that embeds, which is a server of its own."""
    options = ("--parallel", 4, "--ctx-size", 4096, "--embeddings", "--pooling", "mean")
    with servers.peer_server(servers.smollm2(), folder, *options) as server:
        yield server


@pytest.fixture(scope="session")
def server(request):
    """The server that a case runs against."""
    return request.getfixturevalue({"isoflop": "ours"}.get(request.param, request.param))


@pytest.fixture(scope="session")
def embedder(request):
    """The server that a case of embeddings runs against."""
    return request.getfixturevalue({"isoflop": "ours", "peer": "peer_embedder"}[request.param])


@pytest.fixture(scope="session")
def ours_with_tools(folder):
    """`isoflop serve` with a chat template that writes tools, which SmolLM2's own does not."""
    options = ("--slots", 2, "--capacity", 1024, "--chat-template", "hermes")
    with servers.isoflop_server(servers.smollm2(), folder, *options) as server:
        yield server


@pytest.fixture(scope="session")
def tooled(request):
    """The server that a case of tools runs against; llama-server writes them itself where a template does not."""
    return request.getfixturevalue({"isoflop": "ours_with_tools", "peer": "peer"}[request.param])


@pytest.fixture
def client(server):
    """OpenAI's client of the server."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="session")
def model(server):
    """The name of the model."""
    return server.call("GET", "/v1/models").body["data"][0]["id"]
