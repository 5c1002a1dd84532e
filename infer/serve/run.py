"""Start a server: check the address and the memory, load the models, compile their programs, answer until stopped."""

import dataclasses
import errno
import ipaddress
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import uvicorn

from infer.decode import ROOM
from infer.engine import caches_bytes
from infer.serve.app import create_app
from infer.serve.behaviour import Behaviour
from infer.serve.served import Registry, check_names, name_and_path, open_served
from infer.serve.settings import Settings
from model import ModelConfig
from model.accounting import kv_cache_bytes, parameters
from model.errors import InputError, check_at_least_one, check_whole
from model.memory import free_memory
from model.progress import progress_bar, say
from model.store import open_config
from model.tokenizer.templates import read_template

_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.02,
    "int8-dynamic": 1.02,
    "int4": 0.6,
}  # per weight, scales included
_DRAIN_SECONDS = 10  # in which requests may end after SIGTERM
_KEEP_ALIVE_SECONDS = 75  # above the 60 s after which proxies close an idle connection themselves
_BACKLOG = 2048


@dataclasses.dataclass(frozen=True)
class Loading:
    """How the models are loaded: the options of `infer.serve.served.open_served`."""

    tokenizer: Path | None = None
    chat_template: str | None = None
    base: Path | None = None
    slots: int = 8
    capacity: int = 4096
    steps: int = 8
    weights: str = "float32"
    cache: str | None = None
    most_waiting: int = 64
    behaviour: Behaviour | None = None

    def open(self, given: str) -> Any:
        """Load one model, given as PATH or NAME=PATH."""
        named = {"cache": "cache_dtype"}
        names = [field.name for field in dataclasses.fields(self)]
        options = {named.get(name, name): getattr(self, name) for name in names}
        return open_served(given, **options)


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    loading: Loading = Loading(),
    settings: Settings = Settings(),
    without_key: bool = False,
) -> None:
    """Serve models, each given as PATH or NAME=PATH, until a signal: SIGINT ends at once, SIGTERM lets requests end.

    port: 0 takes a free one. without_key: allow a host that other machines reach, without an API key.
    Raises InputError, before anything is loaded, for a host that other machines reach without an API key, a port that
    is in use, a path that is no model, options that are out of range, and models that do not fit the free memory. Exits
    with status 130 after SIGINT.
    """
    check_reachable(host, settings, without_key)
    check_names([name_and_path(given)[0] for given in models])
    check_options(loading)
    configs = {given: open_config(name_and_path(given)[1]) for given in models}
    check_memory(configs, loading)
    listener = listen(host, port)
    if is_loopback(host):
        settings = dataclasses.replace(settings, hosts=("localhost", "127.0.0.1", "[::1]", host))
    try:
        with Registry(_loaded(models, loading)) as registry:
            app = create_app(registry, settings)
            server = _Server(_uvicorn_config(app))
            names = ", ".join(one.name for one in registry)
            print(describe(names, address(listener, host), bool(settings.api_keys)), flush=True)
            server.run(sockets=[listener])
    except KeyboardInterrupt:  # while loading
        sys.exit(130)
    finally:
        listener.close()
    if server.interrupted:
        sys.exit(130)


def check_reachable(host: str, settings: Settings, without_key: bool) -> None:
    """Raise InputError for a host that other machines reach, unless there is an API key or none is wanted."""
    if not (is_loopback(host) or settings.api_keys or without_key):
        raise InputError(
            f"with --host {host}, everyone who reaches this machine may use the server; give --api-key KEY, or --open "
            "to serve without a key"
        )


def check_options(loading: Loading) -> None:
    """Raise InputError for options that are out of range, and for a tokenizer or a chat template that is not there."""
    check_at_least_one(slots=loading.slots, capacity=loading.capacity)
    check_whole("steps", loading.steps, 1, ROOM)
    check_whole("most_waiting", loading.most_waiting, hint="0 takes as many requests as there are slots")
    if loading.tokenizer is not None and not loading.tokenizer.exists():
        raise InputError(f"there is no tokenizer at {loading.tokenizer}; give a tokenizer.json, a model or its folder")
    if loading.chat_template is not None:
        read_template(loading.chat_template)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_memory(configs: Mapping[str, ModelConfig], loading: Loading, free: int | None = None) -> None:
    """Raise InputError unless the models and the caches of their slots fit the free memory. free: None measures it.

    While it is loaded, a model is in memory twice: in float32 and as it is prepared for decode.
    """
    free = _free_device_memory() if free is None else free
    held, most = 0, (0, "", "")
    for given, config in configs.items():
        count, capacity = parameters(config).total, min(loading.capacity, config.max_seq_len)
        weights = int(count * _BYTES.get(loading.weights, 4.0))
        embedded = kv_cache_bytes(config, 1, capacity, loading.cache)  # a text that is embedded or scored
        cache = caches_bytes(config, loading.slots, capacity, loading.cache) + embedded
        parts = (
            f"{_size(weights)} of weights in {loading.weights}, {_size(4 * count)} in float32 while they are loaded, "
            f"{_size(cache)} of caches for {loading.slots} slots of {capacity:,} tokens"
        )
        most = max(most, (held + 4 * count + weights + cache, name_and_path(given)[0], parts))
        held += weights + cache
    if most[0] > free:
        needed, name, parts = most
        raise InputError(
            f"{name} does not fit the memory: it takes {_size(needed)} ({parts}) and {_size(free)} are free; "
            "give fewer --slots, a smaller --capacity, --weights int8 or --cache int8"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, so that the port is taken while models are loaded.

    Raises InputError if the port is in use or not allowed, or the host is not one of this machine.
    """
    name = host.strip("[]")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"--host {host} is no address: {error}; give 127.0.0.1 or a name of this machine") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {host}, port {port}: {error.strerror or error}; is it an address of this machine?"
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use; give another --port, or --port 0 for a free one"
        if error.errno == errno.EACCES:
            message = f"port {port} is for the administrator; give a --port from 1024 on"
        raise InputError(message) from None
    return listener


def address(listener: socket.socket, host: str) -> str:
    """Return the URL at which this machine reaches a server."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host.strip("[]"), host)
    name = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return f"http://{name}:{listener.getsockname()[1]}"


def describe(names: str, url: str, has_keys: bool) -> str:
    """Return the line that is printed when the server answers."""
    key = "with one of the API keys" if has_keys else "with any API key"
    return f"serving {names}: page {url}/ and OpenAI's API at base URL {url}/v1, {key}; Ctrl-C ends"


def _loaded(models: Sequence[str], loading: Loading) -> list[Any]:
    """Load the models and compile their programs."""
    served = []
    with progress_bar("loading and compiling", 2 * len(models)) as advance:
        for given in models:
            say(f"loading {given}")
            served.append(loading.open(given))
            advance(1, served[-1].name)
            if served[-1].service is not None:
                say(f"compiling the programs of {served[-1].name}")
                served[-1].service.engine.warm_up()
            advance(1, served[-1].name)
    return served


def _free_device_memory() -> int:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return free_memory()


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def _uvicorn_config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        backlog=_BACKLOG,
    )


class _Server(uvicorn.Server):
    """uvicorn's server, which SIGINT ends at once and SIGTERM after requests have ended or _DRAIN_SECONDS."""

    interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Remember the signal; uvicorn would raise it again after its end, when nothing is left to stop."""
        self.should_exit = True
        if sig == signal.SIGINT:
            self.interrupted = self.force_exit = True
