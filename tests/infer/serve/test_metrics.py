"""/metrics: vLLM's names, and values that are those of the requests."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from infer.request import Request
from infer.sampling import Sampling
from infer.serve.app import create_app
from infer.serve.metrics import distributions
from infer.serve.settings import Settings

NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
}


def read(client, prefix="isoflop:"):
    """{name without the prefix: {labels without model_name: value}}."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                labels = tuple(value for name, value in sample.labels.items() if name != "model_name")
                assert sample.labels["model_name"] == "tiny"
                found.setdefault(sample.name.removeprefix(prefix), {})[labels] = sample.value
    return found


def test_every_name_is_there_under_the_prefix(client, registry):
    assert set(read(client)) >= NAMES
    with TestClient(create_app(registry, Settings(metrics_prefix="vllm:"))) as other:
        assert set(read(other, "vllm:")) >= NAMES


def test_values_are_those_of_the_requests(client, idle):
    idle()
    before = read(client)
    body = {"prompt": [5, 6, 7], "n": 2, "max_tokens": 9, "ignore_eos": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    idle()
    after = read(client)

    def more(name, *labels):
        return after[name][labels] - before[name][labels]

    assert more("prompt_tokens_total") == 6
    assert more("generation_tokens_total") == 18
    assert more("request_success_total", "length") == 2
    assert more("request_success_total", "stop") == 0
    assert more("time_to_first_token_seconds_count") == 2
    assert more("inter_token_latency_seconds_count") == 16
    assert more("request_generation_tokens_sum") == 18
    assert more("request_generation_tokens_bucket", "10.0") == 2
    assert more("request_generation_tokens_bucket", "5.0") == 0
    assert after["num_requests_running"][()] == after["num_requests_waiting"][()] == 0
    assert more("e2e_request_latency_seconds_sum") == pytest.approx(
        more("request_queue_time_seconds_sum") + more("request_inference_time_seconds_sum")
    )


def test_a_client_that_leaves_is_counted_as_abort(client, served, paused, idle):
    before = read(client)["request_success_total"][("abort",)]
    with paused():
        request = served.service.submit([1], Sampling(), 5, lambda *_: None)
        assert read(client)["num_requests_waiting"][()] == 1
        served.service.cancel(request)
    idle()
    assert read(client)["request_success_total"][("abort",)] == before + 1


def test_times_of_a_request():
    times = [2.0, 3.0, 3.0, 7.0]
    request = Request(
        Sampling(), prompt=[1, 2], max_new_tokens=8, submitted=0.5, started=1.0, first_token=2.0, finished=7.0
    )
    request.tokens, request.token_times = [1, 2, 3, 4], times
    found = {}
    for one in distributions():
        one.observe(request)
        buckets, total = one.read()
        found[one.name] = buckets[-1][1], total
    assert found["time_to_first_token_seconds"] == (1, 1.5)
    assert found["inter_token_latency_seconds"] == (3, 5.0)
    assert found["request_time_per_output_token_seconds"] == (1, pytest.approx(5 / 3))
    assert found["request_queue_time_seconds"] == (1, 0.5)
    assert found["e2e_request_latency_seconds"] == (1, 6.5)
    waiting = Request(Sampling(), prompt=[1], max_new_tokens=8, submitted=0.5, finished=1.0)
    for one in distributions():
        one.observe(waiting)
        has_value = one.name == "e2e_request_latency_seconds" or "tokens" in one.name
        assert one.read()[0][-1][1] == has_value
