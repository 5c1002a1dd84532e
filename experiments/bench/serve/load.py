"""Define a load: requests with their arrival times, prompts and lengths, in a file that can be replayed."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from experiments.bench.serve.arrivals import arrivals
from model.errors import InputError, check_at_least_one, check_number, check_whole

Prompt = str | tuple[int, ...]
"""A text, or token ids."""


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """One request of a load.

    at: seconds after the start at which it arrives; None in a closed loop, where it waits for a free stream. seed: of
    its sampling.
    """

    prompt: Prompt
    max_tokens: int
    at: float | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a line of JSON."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        return {"at": self.at, "prompt": prompt, "max_tokens": self.max_tokens, "seed": self.seed}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read `to_dict`'s output. Raises InputError."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not {"prompt", "max_tokens"} <= set(values) <= names:
            raise InputError(f"a request of a load has prompt, max_tokens and perhaps at and seed, not {values!r:.200}")
        prompt = values["prompt"]
        if not isinstance(prompt, str):
            if not isinstance(prompt, list) or not prompt:
                raise InputError(f"prompt={prompt!r:.200} must be a text or a list of token ids")
            for token in prompt:
                check_whole("a token of a prompt", token)
            prompt = tuple(prompt)
        at = values.get("at")
        if at is not None:
            check_number("at", at, least=0)
        check_at_least_one(max_tokens=values["max_tokens"])
        check_whole("seed", values.get("seed", 0))
        return cls(prompt, values["max_tokens"], at, values.get("seed", 0))


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests in the order of their arrival.

    streams: None for an open loop, in which requests arrive whether or not earlier ones are done; else the number of
    streams of a closed loop, each of which sends the next request when its last one has ended.
    """

    requests: tuple[LoadRequest, ...]
    streams: int | None = None

    def __post_init__(self) -> None:
        if not self.requests:
            raise InputError("a load has at least one request")
        if self.streams is not None:
            check_at_least_one(streams=self.streams)
        elif any(request.at is None for request in self.requests):
            raise InputError("a request of an open loop needs its arrival time, at; a closed loop needs --streams")

    @property
    def most_tokens(self) -> int | None:
        """The largest number of tokens of a request, prompt and output; None if a prompt is a text."""
        if any(isinstance(request.prompt, str) for request in self.requests):
            return None
        return max(len(request.prompt) + request.max_tokens for request in self.requests)

    def write(self, path: Path) -> None:
        """Write one JSON line per request."""
        from train.files import write_atomically

        write_atomically(path, "".join(f"{json.dumps(request.to_dict())}\n" for request in self.requests))

    @classmethod
    def read(cls, path: Path, streams: int | None = None) -> Self:
        """Read what `write` wrote; streams: of a closed loop. Raises InputError with the file and the line."""
        requests = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the load {path} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                requests.append(LoadRequest.from_dict(json.loads(line)))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
        if streams is None:
            requests.sort(key=lambda request: math.inf if request.at is None else request.at)
        return cls(tuple(requests), streams)


def open_load(rate: float, prompts: Sequence[tuple[Prompt, int]], seed: int = 0, *, burstiness: float = 1.0) -> Load:
    """Return prompts with their output lengths, arriving at this rate in requests per second: see `arrivals`."""
    times = arrivals(rate, len(prompts), seed, burstiness=burstiness)
    return Load(
        tuple(
            LoadRequest(prompt, tokens, at, seed + number)
            for number, ((prompt, tokens), at) in enumerate(zip(prompts, times, strict=True))
        )
    )


def closed_load(streams: int, prompts: Sequence[tuple[Prompt, int]], seed: int = 0) -> Load:
    """Return prompts with their output lengths, sent by this many streams, each waiting for its answer."""
    requests = tuple(LoadRequest(prompt, tokens, None, seed + i) for i, (prompt, tokens) in enumerate(prompts))
    return Load(requests, streams)
