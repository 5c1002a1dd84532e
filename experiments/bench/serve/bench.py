"""Measure a server, or an engine, under load: latencies at several rates, and its capacity at a service level."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench.serve.capacity import BISECTIONS, REFINEMENTS, Capacity, find_capacity
from experiments.bench.serve.client import Target
from experiments.bench.serve.load import Load, Prompt, closed_load, open_load
from experiments.bench.serve.measures import Limits, good_in_order, summarize
from experiments.bench.serve.outcome import Outcome
from experiments.bench.serve.target import ClientProcess
from model.errors import InputError
from train.progress import progress_bar

Send = Callable[[Load], list[Outcome]]
"""Send a load to a server, or drive an engine with it."""
MakePrompts = Callable[[int, int], Sequence[tuple[Prompt, int]]]
"""Return this many prompts with their output lengths, drawn by a seed."""

LASTING = 10.0  # times the longest limit on waiting: a queue that grows by a twentieth a second is then seen
MOST_REQUESTS = 5_000  # of one rate
EXPECTED_BEFORE = 4 + BISECTIONS  # rates, before those about the crossing


@dataclasses.dataclass(frozen=True)
class Offered:
    """A load, and how its requests arrive. rate: None in a closed loop, in a replay, and where all arrive at once."""

    load: Load
    arrivals: str
    rate: float | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The columns that name it in a table."""
        return {
            "rate_requests_per_second": self.rate,
            "arrivals": self.arrivals,
            "streams": self.load.streams,
        }


def offered(
    rates: Sequence[float],
    streams: Sequence[int],
    prompts: Sequence[tuple[Prompt, int]],
    seed: int,
    burstiness: float = 1.0,
) -> list[Offered]:
    """Return an open loop at each rate, then a closed loop for each number of streams, with the same prompts."""
    kind = {1.0: "Poisson", math.inf: "constant"}.get(burstiness, f"gamma, burstiness {burstiness:g}")
    found = []
    for rate in rates:
        load = open_load(rate, prompts, seed, burstiness=burstiness)
        at_once = rate == math.inf
        found.append(Offered(load, "all at once" if at_once else kind, None if at_once else rate))
    return found + [Offered(closed_load(count, prompts, seed), "closed loop") for count in streams]


def replayed(load: Load) -> list[Offered]:
    """Return a load that was read from a file, as the only one that is offered."""
    return [Offered(load, "replay" if load.streams is None else "closed loop")]


def bench_loads(
    client: ClientProcess, target: Target, loads: Sequence[Offered], limits: Limits = Limits()
) -> list[dict[str, Any]]:
    """Return one row per load (`summarize`), in order."""
    rows = []
    with progress_bar("load test", sum(len(one.load.requests) for one in loads)) as advance:
        for one in loads:
            so_far = 0

            def ended(count: int) -> None:
                nonlocal so_far
                advance(count - so_far)
                so_far = count

            rows.append(summarize(client.run(target, one.load, ended), limits, **one.place))
    return rows


def bench_capacity(
    send: Send,
    make_prompts: MakePrompts,
    limits: Limits,
    *,
    share: float,
    requests: int,
    streams: int,
    refinements: int = REFINEMENTS,
    seed: int = 0,
    burstiness: float = 1.0,
) -> tuple[Capacity, list[dict[str, Any]]]:
    """Return the highest rate at which `share` of the requests keep all limits, and a row per rate (`summarize`).

    The search starts at half the requests per second of a closed loop with this many streams, and measures each rate
    with fresh prompts and arrivals: at least `requests` of them, for at least ten times the longest limit on waiting,
    since a queue needs time to grow. Raises InputError without limits, and as `find_capacity` does.
    """
    if limits == Limits():
        raise InputError("a capacity needs limits that a good request keeps; give --limits, such as ttft:500 tpot:50")
    rows: list[dict[str, Any]] = []
    with progress_bar("capacity", EXPECTED_BEFORE + refinements) as advance:
        warm = summarize(send(closed_load(streams, make_prompts(max(requests // 2, 2 * streams), seed))))
        saturated = warm["requests_per_second"]
        if saturated == 0:
            words = f": {warm['notes'][0]}" if warm["notes"] else ""
            raise InputError(f"the server served none of the requests of a closed loop{words}")

        def measure(rate: float, of_rate: int) -> list[bool]:
            count = min(max(requests, math.ceil(rate * LASTING * limits.longest_wait)), MOST_REQUESTS)
            load = open_load(rate, make_prompts(count, of_rate), of_rate, burstiness=burstiness)
            outcomes = send(load)
            rows.append(summarize(outcomes, limits, rate_requests_per_second=rate))
            if len(rows) < EXPECTED_BEFORE + refinements:
                advance(1, f"{rate:.3g} requests/s: {rows[-1]['goodput_share']:.0%} good")
            return good_in_order(outcomes, limits)

        capacity = find_capacity(
            measure,
            saturated / 2,
            share=share,
            lowest=saturated / 256,
            highest=4 * saturated,
            refinements=refinements,
            seed=seed + 1,
        )
    return capacity, sorted(rows, key=lambda row: row["rate_requests_per_second"])
