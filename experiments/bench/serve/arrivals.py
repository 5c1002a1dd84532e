"""Draw the times at which requests arrive: Poisson, gamma, constant, or all at once."""

import math

import numpy as np

from model.errors import check_at_least_one, check_number


def arrivals(rate: float, requests: int, seed: int, *, burstiness: float = 1.0) -> list[float]:
    """Return arrival times in seconds of a renewal process that starts at 0; equal seeds give equal times.

    The gaps are gamma-distributed with mean 1/rate, shape `burstiness` and scale 1/(rate · burstiness), as in vLLM's
    benchmark: 1 is a Poisson process, below 1 requests come in bursts, above 1 they are more regular, infinity is a
    constant gap. An infinite rate lets all requests arrive at time 0. Times at two rates with equal seeds differ by the
    ratio of the rates alone.
    """
    check_at_least_one(requests=requests)
    if rate == math.inf:
        return [0.0] * requests
    check_number("rate", rate, above=0)
    if burstiness != math.inf:
        check_number("burstiness", burstiness, above=0, hint="1 is a Poisson process")
    random = np.random.default_rng(seed)
    if burstiness == math.inf:
        gaps = np.full(requests, 1 / rate)
    elif burstiness == 1:
        gaps = random.exponential(1 / rate, requests)
    else:
        gaps = random.gamma(burstiness, 1 / (rate * burstiness), requests)
    return gaps.cumsum().tolist()
