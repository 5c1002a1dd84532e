"""Make the prompts of a load: random token ids or words of given lengths, or the first messages of a file of chats."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.serve.load import Prompt
from model.errors import InputError, check_at_least_one, check_whole

Range = tuple[int, int]
"""The smallest and the largest length, both included."""

_WORDS = """
the of and to in a is that for it was on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would other
into has more her two like him see time could no make than first been its who now people my made over did down only way
find use may water long little very after words called just where most know
"""


def around(length: int) -> Range:
    """Return the range from half to one and a half times a length."""
    return max(1, length // 2), max(1, length + length // 2)


def prompt_maker(
    file: Path | None, vocab_size: int | None, inputs: Range, outputs: Range, *, prefix: int = 0
) -> Callable[[int, int], list[tuple[Prompt, int]]]:
    """Return a function of (requests, seed): entries of a file, random ids, or words if the vocabulary is unknown."""
    if file is not None:
        return lambda requests, seed: prompts_from_file(file, requests, outputs, seed)
    if vocab_size is None:
        return lambda requests, seed: random_words(requests, inputs, outputs, seed, prefix=prefix)
    return lambda requests, seed: random_ids(vocab_size, requests, inputs, outputs, seed, prefix=prefix)


def random_ids(
    vocab_size: int, requests: int, inputs: Range, outputs: Range, seed: int, *, prefix: int = 0
) -> list[tuple[Prompt, int]]:
    """Return (prompt of random ids, tokens to generate) of every request, lengths uniform over the ranges.

    prefix: the first tokens of all prompts are the same and count as part of their lengths, so that a server with
    prefix reuse reads them once.
    """
    check_whole("vocab_size", vocab_size, 2)
    return list(_random(vocab_size, requests, inputs, outputs, seed, prefix))


def random_words(
    requests: int, inputs: Range, outputs: Range, seed: int, *, prefix: int = 0
) -> list[tuple[Prompt, int]]:
    """Return (prompt of common English words, tokens to generate): lengths of prompts are in words.

    A server's tokens differ from words; its `usage` says how many it read.
    """
    words = _WORDS.split()
    drawn = _random(len(words), requests, inputs, outputs, seed, prefix)
    return [(" ".join(words[index] for index in prompt), tokens) for prompt, tokens in drawn]


def _random(
    size: int, requests: int, inputs: Range, outputs: Range, seed: int, prefix: int
) -> list[tuple[tuple[int, ...], int]]:
    """Return (indices below a size, tokens to generate) of every request."""
    check_at_least_one(requests=requests)
    for name, (low, high) in {"input": inputs, "output": outputs}.items():
        check_whole(name, low, 1)
        check_whole(name, high, low, hint="give the smaller length first")
    check_whole("prefix", prefix, 0, inputs[0], hint="it is part of every prompt's length")
    random = np.random.default_rng([seed, 1])
    lengths = random.integers(inputs[0], inputs[1] + 1, requests)
    tokens = np.random.default_rng([seed, 2]).integers(outputs[0], outputs[1] + 1, requests)
    shared = np.random.default_rng([seed, 3]).integers(0, size, prefix).tolist()
    return [
        (tuple(shared + random.integers(0, size, int(length) - prefix).tolist()), int(most))
        for length, most in zip(lengths, tokens, strict=True)
    ]


def prompts_from_file(path: Path, requests: int, outputs: Range, seed: int) -> list[tuple[Prompt, int]]:
    """Return (prompt, tokens to generate) of random entries of a file; entries repeat if there are fewer.

    A JSON list or JSON lines. An entry has a "prompt" (text or ids), or the first message that the user writes of
    "messages" ([{"role", "content"}]) or "conversations" ([{"from", "value"}], as in ShareGPT). Its "max_tokens" is
    used if it has any, else a length of the range. Raises InputError.
    """
    check_at_least_one(requests=requests)
    found = [prompt for entry in _entries(path) if (prompt := _prompt_of(entry)) is not None]
    if not found:
        raise InputError(f"{path} has no entry with a prompt, messages or conversations; give one with any of these")
    random = np.random.default_rng([seed, 1])
    order = np.concatenate([random.permutation(len(found)) for _ in range(-(-requests // len(found)))])[:requests]
    tokens = random.integers(outputs[0], outputs[1] + 1, requests)
    return [(found[index][0], found[index][1] or int(most)) for index, most in zip(order.tolist(), tokens, strict=True)]


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts {path} cannot be read: {error}") from None
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is neither a JSON list nor JSON lines: {error}") from None


def _prompt_of(entry: Any) -> tuple[Prompt, int | None] | None:
    if not isinstance(entry, dict):
        return None
    most = entry.get("max_tokens")
    prompt = entry.get("prompt")
    if isinstance(prompt, str) and prompt:
        return prompt, most
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return tuple(prompt), most
    for name, who, what, user in (
        ("messages", "role", "content", ("user",)),
        ("conversations", "from", "value", ("human", "user")),
    ):
        turns = entry.get(name)
        for turn in turns if isinstance(turns, Sequence) else ():
            if isinstance(turn, dict) and turn.get(who) in user and isinstance(turn.get(what), str) and turn[what]:
                return turn[what], most
    return None
