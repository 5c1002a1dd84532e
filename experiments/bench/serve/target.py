"""Reach servers: look at one by its URL, start one of a model's own, send it loads from a process of its own."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.peers.child import Child
from experiments.bench.serve.client import Target
from experiments.bench.serve.load import Load
from experiments.bench.serve.outcome import Outcome
from experiments.process import interrupt_on_sigterm
from model.errors import InputError, UnknownNameError

START_SECONDS = 600.0
END_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Reached:
    """A server that answers. vocab_size: of its model, if it says so in its list of models."""

    url: str
    model: str
    vocab_size: int | None


def reach(url: str, model: str | None = None, api_key: str | None = None) -> Reached:
    """Return the server at a URL and one of its models, by default the first of its list.

    Raises InputError, in one sentence, if no server answers, the key is wrong, or it has no model of that name.
    """
    url = url.rstrip("/").removesuffix("/v1")
    request = urllib.request.Request(f"{url}/v1/models")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            listed = json.load(answer)["data"]
            names = [str(entry["id"]) for entry in listed]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            words = "a wrong key" if api_key else "no key"
            raise InputError(
                f"the server at {url} refuses {words} (HTTP {error.code}); give --api-key, or set ISOFLOP_API_KEY"
            ) from None
        if error.code == 404 and model is not None:
            return Reached(url, model, None)
        raise InputError(f"{url}/v1/models answers with HTTP {error.code}; is it a server with OpenAI's API?") from None
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"no server answers at {url} ({reason}); start one with `isoflop serve MODEL`") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{url}/v1/models is not a list of models; is it a server with OpenAI's API?") from None
    if not names:
        raise InputError(f"the server at {url} has no model")
    if model is not None and model not in names:
        raise UnknownNameError(f"model of {url}", model, names, guess=False)
    chosen = listed[names.index(model)] if model is not None else listed[0]
    meta = chosen.get("meta") or {}
    size = meta.get("n_vocab") or meta.get("vocab_size") or chosen.get("vocab_size")
    return Reached(url, str(chosen["id"]), size if isinstance(size, int) else None)


class ClientProcess(Child):
    """The client of `client.py`, which takes one load after another."""

    def __init__(self, folder: Path, nice: int = 0):
        command = [sys.executable, "-m", "experiments.bench.serve.client", str(nice)]
        super().__init__(command, "the client of the load test", folder / "client.log")
        self.folder = folder

    def run(self, target: Target, load: Load, ended: Callable[[int], None] = lambda count: None) -> list[Outcome]:
        """Send a load and return the outcomes in its order; ended: called with the number of requests ended so far."""
        path = self.folder / "load.jsonl"
        load.write(path)
        spec = {"target": dataclasses.asdict(target), "load": str(path), "streams": load.streams}
        answer = self.ask(json.dumps(spec))
        while "outcomes" not in answer:
            ended(answer["ended"])
            answer = self._answer()
        ended(len(load.requests))
        return [Outcome.from_dict(values) for values in answer["outcomes"]]


@contextlib.contextmanager
def new_client(nice: int = 0) -> Iterator[ClientProcess]:
    """Start a client, and end it afterwards."""
    with tempfile.TemporaryDirectory(prefix="isoflop-load-") as folder, ClientProcess(Path(folder), nice) as client:
        yield client


def free_port() -> int:
    """Return a port of the loopback address that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started(command: Sequence[str], port: int, name: str, environment: Mapping[str, str] = {}) -> Iterator[str]:
    """Start a server that listens on a port of the loopback address, and give its URL when /health is good.

    Ends it afterwards. Raises InputError with its last message if it ends instead.
    """
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="isoflop-serve-") as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the server
            )
        try:
            with interrupt_on_sigterm():
                _await_health(process, url, name, log)
                yield url
        finally:
            _end(process)


def _await_health(process: subprocess.Popen, url: str, name: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            last = lines[-1].removeprefix("isoflop: ") if lines else "it wrote no error message"
            raise InputError(f"{name} did not start: {last}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:  # not there yet, or still loading
            time.sleep(0.1)
    raise InputError(f"{name} did not answer within {START_SECONDS:.0f} s")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: it was started as a session's leader
        process.wait()


def own_server(model: str, port: int, slots: int, options: Sequence[str] = ()) -> list[str]:
    """Return the command of `isoflop serve` for a model on a port of the loopback address."""
    program = "from experiments.cli import main; main()"
    return [sys.executable, "-c", program, "serve", model, "--port", str(port), "--slots", str(slots), *options]


def llama_server(binary: str, model: str, port: int, slots: int, capacity: int) -> list[str]:
    """Return the command of llama.cpp's server for a GGUF file; capacity: tokens of a slot."""
    words = ["--host", "127.0.0.1", "--port", str(port), "--parallel", str(slots), "--ctx-size", str(slots * capacity)]
    return [binary, "--model", model, *words]


def target_of(reached: Reached, endpoint: str, api_key: str | None, body: dict[str, Any], timeout: float) -> Target:
    """Return the target of a load on a server."""
    return Target(reached.url, reached.model, endpoint, api_key, timeout, body)
