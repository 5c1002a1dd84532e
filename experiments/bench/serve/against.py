"""Compare a server with others and with the bare engine: the same closed loop, in turns."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench.rounds import interleaved, median_and_range
from experiments.bench.serve.load import closed_load
from experiments.bench.serve.measures import summarize
from experiments.bench.serve.over_http import MakePrompts, Send
from experiments.words import counted
from model.errors import InputError, check_at_least_one
from train.progress import progress_bar

OWN = "isoflop"


def take_turns(
    contenders: Mapping[str, Send],
    make_prompts: MakePrompts,
    *,
    streams: Sequence[int],
    requests: int,
    rounds: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return a row per number of streams and contender: median tokens per second, and ours over theirs by round.

    All get the same prompts in a round, and other ones in the next, so that no prefix cache helps. One round before the
    first is not counted. Raises InputError if a contender does not serve all requests in full.
    """
    check_at_least_one(rounds=rounds, requests=requests)
    rows = []
    with progress_bar("turns", len(streams) * (rounds + 1) * len(contenders)) as advance:
        for count in streams:
            speeds: dict[str, list[float]] = {name: [] for name in contenders}
            rest: dict[str, dict[str, Any]] = {}
            numbers = dict.fromkeys(contenders, 0)
            for name in [*contenders, *interleaved(list(contenders), rounds)]:
                load = closed_load(count, make_prompts(requests, seed + numbers[name]))
                row = summarize(contenders[name](load), streams=count)
                _check_whole(name, row, sum(request.max_tokens for request in load.requests))
                if numbers[name]:
                    speeds[name].append(row["tokens_per_second"])
                    rest[name] = row
                numbers[name] += 1
                advance()
            rows += [_row(name, count, speeds, rest[name]) for name in contenders]
    return rows


def _row(name: str, streams: int, speeds: Mapping[str, list[float]], last: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": name, "streams": streams, "requests": last["requests"]}
    row |= median_and_range("tokens_per_second", speeds[name])
    if name != OWN:
        ratios = [own / other for own, other in zip(speeds[OWN], speeds[name], strict=True)]
        row |= median_and_range("isoflop_over_this", ratios)
    latencies = ("time_to_first_token_seconds", "time_per_output_token_seconds")
    return row | {name: last[name] for name in latencies} | {"samples": {"tokens_per_second": speeds[name]}}


def _check_whole(name: str, row: Mapping[str, Any], tokens: int) -> None:
    missing = row["requests"] - row["served"]
    if missing:
        words = f": {row['notes'][0]}" if row["notes"] else ""
        raise InputError(f"{name} did not serve {counted(missing, 'request')} of {row['requests']}{words}")
    if row["output_tokens"] != tokens:
        raise InputError(
            f"{name} gave {row['output_tokens']:,} tokens of {tokens:,}; the contenders must give the same number"
        )


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how fast our server is beside each other contender."""
    parts = []
    for row in rows:
        if row["contender"] == OWN:
            continue
        parts.append(
            f"at {counted(row['streams'], 'stream')} isoflop serve gives {row['isoflop_over_this']:.2f} times the "
            f"tokens per second of {row['contender']} ({row['isoflop_over_this_lowest']:.2f} … "
            f"{row['isoflop_over_this_highest']:.2f} over {counted(len(row['samples']['tokens_per_second']), 'round')})"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
