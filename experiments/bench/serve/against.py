"""Compare a server with others and with the bare engine: the same closed loop, in turns."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench.rounds import interleaved, median_and_range
from experiments.bench.serve.bench import MakePrompts, Send
from experiments.bench.serve.load import closed_load
from experiments.bench.serve.measures import summarize
from experiments.words import counted
from model.errors import InputError, check_at_least_one
from train.progress import progress_bar

OWN, BARE = "isoflop", "bare engine"


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

    All get the same prompts in a round, and other ones in every other, so that no prefix cache helps. One round before
    the first is not counted. Raises InputError if a contender does not serve all requests in full.
    """
    check_at_least_one(rounds=rounds, requests=requests)
    rows = []
    with progress_bar("turns", len(streams) * (rounds + 1) * len(contenders)) as advance:
        for place, count in enumerate(streams):
            speeds: dict[str, list[float]] = {name: [] for name in contenders}
            measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
            numbers = dict.fromkeys(contenders, 0)
            for name in [*contenders, *interleaved(list(contenders), rounds)]:
                fresh = seed + place * (rounds + 1) + numbers[name]
                load = closed_load(count, make_prompts(requests, fresh))
                row = summarize(contenders[name](load), streams=count)
                _check_whole(name, row, sum(request.max_tokens for request in load.requests))
                if numbers[name]:
                    speeds[name].append(row["tokens_per_second"])
                    measured[name].append(row)
                numbers[name] += 1
                advance()
            rows += [_row(name, count, speeds, measured[name]) for name in contenders]
    return rows


def _row(
    name: str, streams: int, speeds: Mapping[str, list[float]], measured: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": name, "streams": streams, "requests": measured[0]["requests"]}
    row |= median_and_range("tokens_per_second", speeds[name])
    if name != OWN:
        ratios = [own / other for own, other in zip(speeds[OWN], speeds[name], strict=True)]
        row |= median_and_range("isoflop_over_this", ratios)
    for latency in ("time_to_first_token_seconds", "time_per_output_token_seconds"):
        known = [one[latency] for one in measured if one[latency] is not None]  # of single tokens, there is none
        row[latency] = statistics.median(known) if known else None
    return row | {"samples": {"tokens_per_second": speeds[name]}}


def _check_whole(name: str, row: Mapping[str, Any], tokens: int) -> None:
    missing = row["requests"] - row["served"]
    if missing:
        words = f": {row['notes'][0]}" if row["notes"] else ""
        raise InputError(f"{name} did not serve {counted(missing, 'request')} of {row['requests']}{words}")
    if row["output_tokens"] != tokens:
        raise InputError(
            f"{name} gave {row['output_tokens']:,} tokens of {tokens:,}; the contenders must give the same number"
        )


def turns_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return (column names, cells as text) of the rows of `take_turns`."""
    header = ["streams", "contender", "tok/s", "lowest … highest", "isoflop over this", "first token s", "per token s"]
    lines = []
    for row in rows:
        speed, ratio = "tokens_per_second", "isoflop_over_this"
        over = ""
        if ratio in row:
            over = f"{row[ratio]:.3f} ({row[f'{ratio}_lowest']:.3f} … {row[f'{ratio}_highest']:.3f})"
        line = [str(row["streams"]), row["contender"], f"{row[speed]:.4g}"]
        line += [f"{row[f'{speed}_lowest']:.4g} … {row[f'{speed}_highest']:.4g}", over]
        latencies = ("time_to_first_token_seconds", "time_per_output_token_seconds")
        lines.append([*line, *("" if row[name] is None else f"{row[name]:.3g}" for name in latencies)])
    return header, lines


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how fast our server is beside each other contender, and what HTTP costs of the bare engine's speed."""
    parts = []
    for row in rows:
        if row["contender"] == OWN:
            continue
        low, high = row["isoflop_over_this_lowest"], row["isoflop_over_this_highest"]
        rounds = f"median of {counted(len(row['samples']['tokens_per_second']), 'round')}"
        where = f"at {counted(row['streams'], 'stream')}"
        if row["contender"] == BARE:
            cost = 1 - row["isoflop_over_this"]
            parts.append(
                f"{where} HTTP costs {cost:.1%} of the tokens per second ({1 - high:.1%} … {1 - low:.1%}, {rounds})"
            )
        else:
            parts.append(
                f"{where} isoflop serve gives {row['isoflop_over_this']:.2f} times the tokens per second of "
                f"{row['contender']} ({low:.2f} … {high:.2f}, {rounds})"
            )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
