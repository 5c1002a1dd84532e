"""/metrics: what the engines do and how long requests took, for Prometheus, under the names that vLLM gives them."""

import bisect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from infer.request import Request
from infer.serve.endpoint import Endpoint
from infer.serve.served import Registry
from infer.serve.settings import Settings

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_COUNT = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""The names that vLLM gives to finish reasons."""


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoint of metrics, which are read when they are requested."""
    collected = prometheus_client.CollectorRegistry(auto_describe=False)
    collected.register(_Models(registry, settings.metrics_prefix))
    prometheus_client.ProcessCollector(registry=collected)

    async def metrics(request: HttpRequest, body: None) -> Response:
        content = prometheus_client.generate_latest(collected)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return [Endpoint("GET", "/metrics", metrics, "Metrics for Prometheus.", media_type="text/plain")]


class Distribution:
    """How many values fell below each of some bounds, as a histogram of Prometheus counts them."""

    def __init__(self, name: str, what: str, bounds: Sequence[float], values: Callable[[Request], Iterable[float]]):
        """values: what a request that ended adds."""
        self.name, self.what, self._bounds, self._values = name, what, bounds, values
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, request: Request) -> None:
        """Add the values of a request that ended."""
        for value in self._values(request):
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sum += value

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Return the pairs (bound, number of values up to it), and the sum of the values."""
        pairs, total = [], 0
        for bound, count in zip((*(str(float(bound)) for bound in self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((bound, float(total)))
        return pairs, self._sum


def distributions() -> list[Distribution]:
    """Return the distributions of one model's requests; the engine's thread observes them."""
    return [
        Distribution(
            "time_to_first_token_seconds",
            "From submission to the first token.",
            _FIRST_TOKEN,
            _between("submitted", "first_token"),
        ),
        Distribution(
            "inter_token_latency_seconds",
            "Between tokens; the time between two steps is divided among the tokens of the later one.",
            _TOKEN,
            _between_tokens,
        ),
        Distribution(
            "request_time_per_output_token_seconds",
            "Mean time between a request's tokens.",
            _TOKEN,
            _per_token,
        ),
        Distribution(
            "e2e_request_latency_seconds", "From submission to the end.", _REQUEST, _between("submitted", "finished")
        ),
        Distribution("request_queue_time_seconds", "In the queue.", _REQUEST, _between("submitted", "started")),
        Distribution(
            "request_prefill_time_seconds",
            "From the queue to the first token.",
            _REQUEST,
            _between("started", "first_token"),
        ),
        Distribution(
            "request_decode_time_seconds",
            "From the first token to the end.",
            _REQUEST,
            _between("first_token", "finished"),
        ),
        Distribution(
            "request_inference_time_seconds", "From the queue to the end.", _REQUEST, _between("started", "finished")
        ),
        Distribution("request_prompt_tokens", "Tokens of a prompt.", _COUNT, lambda request: [len(request.prompt)]),
        Distribution(
            "request_generation_tokens", "Tokens of an answer.", _COUNT, lambda request: [len(request.tokens)]
        ),
        Distribution(
            "request_params_max_tokens",
            "Tokens that an answer may have.",
            _COUNT,
            lambda request: [request.max_new_tokens],
        ),
    ]


def _between(start: str, end: str) -> Callable[[Request], Iterable[float]]:
    def seconds(request: Request) -> list[float]:
        times = getattr(request, start), getattr(request, end)
        return [] if None in times else [times[1] - times[0]]

    return seconds


def _between_tokens(request: Request) -> Iterator[float]:
    times = request.token_times
    last, begin = times[0] if times else 0.0, bisect.bisect_right(times, times[0]) if times else 0
    while begin < len(times):
        end = bisect.bisect_right(times, times[begin])
        yield from [(times[begin] - last) / (end - begin)] * (end - begin)
        last, begin = times[begin], end


def _per_token(request: Request) -> list[float]:
    times = request.token_times
    return [(times[-1] - times[0]) / (len(times) - 1)] if len(times) > 1 else []


class _Models(Collector):
    """The metrics of all models; each has the label model_name."""

    def __init__(self, registry: Registry, prefix: str):
        self._models = [one for one in registry if one.service is not None]
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        """Yield the present values."""
        loads = {one.name: one.service.load() for one in self._models if one.service is not None}
        totals = {one.name: one.service.totals() for one in self._models if one.service is not None}

        def each(values: dict[str, Any], get: Callable[[Any], float]) -> dict[tuple[str, ...], float]:
            return {(name,): get(value) for name, value in values.items()}

        yield self._gauge("num_requests_running", "Requests that are served.", each(loads, lambda load: load.running))
        yield self._gauge("num_requests_waiting", "Requests that wait.", each(loads, lambda load: load.waiting))
        usage = each(loads, lambda load: load.cache_share)
        yield self._gauge("kv_cache_usage_perc", "Share of the slots' cache that is used; 1 is all of it.", usage)
        for name, what, field in (
            ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.", "prefix_queries"),
            ("prefix_cache_hits", "Tokens of prompts that did not have to be read.", "prefix_hits"),
            ("prompt_tokens", "Tokens of prompts.", "prompt_tokens"),
            ("generation_tokens", "Tokens that were generated.", "generated_tokens"),
        ):
            yield self._counter(name, what, each(totals, operator.attrgetter(field)))
        ended: dict[tuple[str, ...], float] = {
            (name, label): total.finished.get(reason, 0)
            for name, total in totals.items()
            for reason, label in _REASONS.items()
        }
        yield self._counter("request_success", "Requests that ended.", ended, ("finished_reason",))
        for same in zip(*(one.distributions for one in self._models), strict=True):
            family = HistogramMetricFamily(self._prefix + same[0].name, same[0].what, labels=["model_name"])
            for model, distribution in zip(self._models, same, strict=True):
                buckets, total = distribution.read()
                family.add_metric([model.name], buckets, total)
            yield family

    def _gauge(self, name: str, what: str, values: dict[tuple[str, ...], float]) -> Metric:
        return self._filled(GaugeMetricFamily(self._prefix + name, what, labels=["model_name"]), values)

    def _counter(
        self, name: str, what: str, values: dict[tuple[str, ...], float], more: tuple[str, ...] = ()
    ) -> Metric:
        return self._filled(CounterMetricFamily(self._prefix + name, what, labels=["model_name", *more]), values)

    @staticmethod
    def _filled(family: Any, values: dict[tuple[str, ...], float]) -> Metric:
        for labels, value in values.items():
            family.add_metric(list(labels), value)
        return family
