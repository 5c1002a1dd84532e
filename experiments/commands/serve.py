"""Implement `isoflop serve`: models behind OpenAI's API, and a page to talk to them."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.commands.options import BasePath, data_file, need_serving

Keys = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY ...")]
Origins = Annotated[tuple[str, ...], tyro.conf.arg(metavar="ORIGIN ...")]


def serve(
    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL ...")]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokenizer: Path | None = None,
    chat_template: str | None = None,
    base: BasePath = None,
    slots: int = 8,
    capacity: int = 4096,
    steps: int = 8,
    weights: Literal["float32", "bfloat16", "int8", "int8-dynamic", "int4"] = "float32",
    cache: Literal["float32", "bfloat16", "int8"] | None = None,
    most_waiting: int = 64,
    api_key: Keys = (),
    open: bool = False,
    cors_origin: Origins = (),
    behaviour: Path | None = None,
    conversations: str | None = None,
    most_body_mb: float = 10.0,
    metrics_prefix: Literal["isoflop:", "vllm:"] = "isoflop:",
) -> None:
    """Serve models behind OpenAI's API, with a page to talk to them.

    Example: isoflop serve runs/first

    Example: isoflop serve tuned=runs/tuned base=model.gguf --port 8001 --weights int8 --api-key "$(cat key.txt)"

    The page is at http://127.0.0.1:8000/, and a client such as openai.OpenAI(base_url="http://127.0.0.1:8000/v1",
    api_key="none") calls every model by its name; /openapi.json describes the API.

    Args:
        models: Run directories, Hugging Face folders or GGUF files. NAME=PATH names a model for clients; by default it
            has the name of its folder or file. The first one answers requests without a model.
        host: The address to listen on. Others than 127.0.0.1 are reached from other machines and need --api-key.
        port: The port to listen on; 0 takes a free one.
        tokenizer: The models' tokenizer (a file, or a folder such as the data's), if their folders have none.
        chat_template: The form of conversations, a name such as chatml or a Jinja file, in place of the models' own.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
        slots: Requests that run at the same time; further ones wait.
        capacity: Most tokens of a request, prompt and output together; at most the model's context.
        steps: Tokens per request and step: more cost less each, and arrive less often.
        weights: Precision in which the weights are read.
        cache: Precision of the cache; by default that of the computation.
        most_waiting: Requests that may wait; further ones are refused with 429.
        api_key: Keys of which clients must send one. The environment variable ISOFLOP_API_KEY, with commas between
            keys, hides them from other users of this machine.
        open: Allow a --host that other machines reach, without a key.
        cors_origin: Origins, such as https://example.org, whose pages may call the server from a browser.
        behaviour: A TOML file with the system prompt, filters of input and output, and limits per key.
        conversations: The SQLite file of the page's conversations, by default conversations.sqlite in
            $XDG_DATA_HOME/isoflop (~/.local/share/isoflop); none stores nothing.
        most_body_mb: Largest body of a request, in millions of bytes.
        metrics_prefix: Before the names in /metrics; dashboards of vLLM read vllm:.
    """
    import os

    need_serving("serve")
    from infer.serve.behaviour import Behaviour
    from infer.serve.run import Loading
    from infer.serve.run import serve as run_server
    from infer.serve.settings import Settings
    from model.errors import InputError

    if not models:
        raise InputError("there is no model to serve; give a run directory, a Hugging Face folder or a GGUF file")
    given = os.environ.get("ISOFLOP_API_KEY", "")
    keys = tuple(dict.fromkeys(key for key in (*api_key, *map(str.strip, given.split(","))) if key))
    controls = None if behaviour is None else Behaviour.read(behaviour)
    settings = Settings(
        api_keys=keys,
        most_body_bytes=int(most_body_mb * 1_000_000),
        cors_origins=cors_origin,
        behaviour=controls,
        metrics_prefix=metrics_prefix,
        conversations=_file(conversations),
    )
    loading = Loading(tokenizer, chat_template, base, slots, capacity, steps, weights, cache, most_waiting, controls)
    run_server(models, host=host, port=port, loading=loading, settings=settings, without_key=open)


def _file(given: str | None) -> Path | None:
    if given == "none":
        return None
    return data_file("conversations.sqlite") if given is None else Path(given)
