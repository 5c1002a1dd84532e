"""Summarise the outcomes of a load: latencies, throughput, goodput under limits, refusals and failures."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from experiments.bench.serve.outcome import Outcome
from model.errors import InputError, UnknownNameError, check_number

TTFT, TPOT, E2E = "time_to_first_token_seconds", "time_per_output_token_seconds", "end_to_end_seconds"
_PERCENTS = (("", 50), ("_p90", 90), ("_p95", 95), ("_p99", 99))
_LIMIT = re.compile(r"([a-z0-9]+):(\d+(?:\.\d+)?)(ms|s)?")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits in seconds within which a request counts as good; None: any time will do.

    ttft: to the first token; tpot: per output token after it; e2e: to the end.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def __post_init__(self) -> None:
        for name, limit in dataclasses.asdict(self).items():
            if limit is not None:
                check_number(name, limit, above=0)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Self:
        """Read `ttft:500 tpot:50 e2e:10s`: milliseconds, or seconds with an s. Raises InputError."""
        known = [field.name for field in dataclasses.fields(cls)]
        limits: dict[str, float] = {}
        for text in texts:
            match = _LIMIT.fullmatch(text.lower())
            if match is None:
                raise InputError(f"the limit {text!r} is not of the form ttft:500 (milliseconds) or ttft:0.5s")
            name, value, unit = match.groups()
            if name not in known:
                raise UnknownNameError("limit", name, known, guess=False)
            if name in limits:
                raise InputError(f"the limit {name} is given twice; give it once")
            limits[name] = float(value) / (1 if unit == "s" else 1000)
        return cls(**limits)

    @property
    def longest_wait(self) -> float:
        """The longest of the limits on a request's waiting time in seconds; 0 without one."""
        return max(self.ttft or 0.0, self.e2e or 0.0)

    def are_met(self, outcome: Outcome) -> bool:
        """Return whether a request was served within all limits; refused and failed ones never are."""
        if outcome.status != "served" or outcome.first is None:
            return False
        pairs = (
            (self.ttft, outcome.first - outcome.due),
            (self.tpot, outcome.seconds_per_output_token),
            (self.e2e, outcome.ended - outcome.due),
        )
        return all(limit is None or seconds is None or seconds <= limit for limit, seconds in pairs)

    def __str__(self) -> str:
        given = {name: limit for name, limit in dataclasses.asdict(self).items() if limit is not None}
        return ", ".join(f"{name} ≤ {1000 * limit:g} ms" for name, limit in given.items()) or "no limit"


def latencies(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Return the samples in seconds of every latency, of the served requests only.

    time_to_first_token and end_to_end count from a request's arrival, which is when it was due: a busy client or engine
    hides no waiting time (coordinated omission); time_to_first_token_from_sending counts from when it was sent.
    inter_chunk_latency is the gap between two chunks of a request, as a client of its stream sees it and as vLLM's
    benchmark counts ITL; inter_token_latency has a value for every token after the first chunk, its chunk's gap over
    the chunk's tokens. time_per_output_token is a request's time from its first token to its end, over the tokens after
    the first; requests of one token have none.
    """
    served = [outcome for outcome in outcomes if outcome.status == "served"]
    gaps = [np.diff(outcome.chunk_times) for outcome in served]
    tokens = [np.asarray(outcome.chunk_tokens[1:], int) for outcome in served]
    each = [np.repeat(gap / np.maximum(count, 1), count).tolist() for gap, count in zip(gaps, tokens, strict=True)]
    per_token = [outcome.seconds_per_output_token for outcome in served]
    return {
        TTFT: [_known(outcome.first) - outcome.due for outcome in served],
        "time_to_first_token_from_sending_seconds": [_known(outcome.first) - outcome.sent for outcome in served],
        "inter_chunk_latency_seconds": [second for gap in gaps for second in gap.tolist()],
        "inter_token_latency_seconds": [second for of_request in each for second in of_request],
        TPOT: [seconds for seconds in per_token if seconds is not None],
        E2E: [outcome.ended - outcome.due for outcome in served],
    }


def summarize(outcomes: Sequence[Outcome], limits: Limits = Limits(), **place: Any) -> dict[str, Any]:
    """Return one row: `place`, then median, p90, p95, p99, mean and std of every latency, throughput and goodput.

    A latency without a value is None. Throughput is of the served requests, over the time from the first arrival to
    the last end of any request. goodput counts the requests within all limits; refused and failed requests are not
    good, and are not in the latencies. refusal_seconds: from sending a request to its refusal.
    """
    samples = latencies(outcomes)
    served = [outcome for outcome in outcomes if outcome.status == "served"]
    refusals = [outcome.ended - outcome.sent for outcome in outcomes if outcome.status == "refused"]
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    seconds = max(max(outcome.ended for outcome in outcomes) - min(outcome.due for outcome in outcomes), 1e-9)
    good = sum(map(limits.are_met, outcomes))
    row: dict[str, Any] = {**place, "requests": len(outcomes)}
    for name, values in samples.items():
        row |= _statistics(name, values)
    chunk_sizes = [count for outcome in served for count in outcome.chunk_tokens[1:]]
    notes = sorted({outcome.note for outcome in outcomes if outcome.note})
    return row | {
        "tokens_per_chunk": float(np.mean(chunk_sizes)) if chunk_sizes else None,
        "requests_per_second": len(served) / seconds,
        "tokens_per_second": sum(outcome.output_tokens for outcome in served) / seconds,
        "total_tokens_per_second": sum(o.output_tokens + o.prompt_tokens for o in served) / seconds,
        "output_tokens": sum(outcome.output_tokens for outcome in served),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in served),
        "goodput_requests_per_second": good / seconds,
        "goodput_share": good / len(outcomes),
        "good": good,
        "served": len(served),
        "refused": len(refusals),
        "refusal_seconds": float(np.percentile(refusals, 50)) if refusals else None,
        "refusal_seconds_p99": float(np.percentile(refusals, 99)) if refusals else None,
        "failed": len(failed),
        "notes": notes,
        "seconds": seconds,
        "ttft_limit_seconds": limits.ttft,
        "tpot_limit_seconds": limits.tpot,
        "e2e_limit_seconds": limits.e2e,
        "samples": samples,
    }


def good_in_order(outcomes: Sequence[Outcome], limits: Limits) -> list[bool]:
    """Return for each request, in the order of arrival, whether it was good."""
    return [limits.are_met(outcome) for outcome in sorted(outcomes, key=lambda outcome: outcome.due)]


def _statistics(name: str, values: Sequence[float]) -> Mapping[str, float | None]:
    if not values:
        return {name + suffix: None for suffix in (*dict(_PERCENTS), "_mean", "_std")}
    found = {name + suffix: float(np.percentile(values, percent)) for suffix, percent in _PERCENTS}
    return found | {f"{name}_mean": float(np.mean(values)), f"{name}_std": float(np.std(values))}


def _known(seconds: float | None) -> float:
    assert seconds is not None, "a served request has a first token"
    return seconds
