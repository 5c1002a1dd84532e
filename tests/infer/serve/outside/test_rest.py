"""Models, embeddings, tokens, health, metrics, the document: what stands beside generation."""

import base64
import struct

import pytest


def tokenize(server, text, special=False):
    return server.post("/tokenize", prompt=text, content=text, add_special_tokens=special, add_special=special)


def test_models(server, client, model):
    assert [one.id for one in client.models.list()] == [model]


def test_one_model(ours):
    (card,) = ours.call("GET", "/v1/models").body["data"]
    assert ours.call("GET", f"/v1/models/{card['id']}").body == card
    assert card["max_model_len"] == 1024
    missing = ours.call("GET", "/v1/models/gpt-4")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("text", ["What is the capital of France ?", " a  b\n\tc ", "日本語 👩‍👩‍👧 é", "x" * 500])
def test_tokens_are_the_text_again(server, text):
    tokens = tokenize(server, text).body["tokens"]
    answer = server.post("/detokenize", tokens=tokens)
    assert (answer.body.get("prompt") or answer.body.get("content")) == text


def test_the_answer_of_tokenize_counts(ours):
    body = tokenize(ours, "The capital of France").body
    assert body["count"] == len(body["tokens"]) == 4
    assert body["max_model_len"] == 1024


def test_a_conversation_is_tokenized_as_it_is_answered(ours):
    messages = [{"role": "user", "content": "Hello"}]
    body = ours.post("/tokenize", messages=messages).body
    assert body["count"] == ours.chat(messages=messages).body["usage"]["prompt_tokens"]


def test_no_text_has_no_tokens(server):
    assert tokenize(server, "").body["tokens"] == []


@pytest.mark.parametrize("tokens", [[-1], [10**9], ["x"], "x", None, [10**30]], ids=str)
def test_tokens_that_are_none_are_refused(ours, tokens):
    answer = ours.post("/detokenize", tokens=tokens)
    assert answer.status == 400
    assert answer.error["param"].startswith("tokens")


def test_an_embedding_is_a_unit_vector(embedder):
    answer = embedder.post("/v1/embeddings", input="The meaning of life")
    (one,) = answer.body["data"]
    assert one["object"] == "embedding"
    assert sum(value**2 for value in one["embedding"]) == pytest.approx(1, abs=1e-3)
    assert answer.body["usage"]["prompt_tokens"] > 2


def test_embeddings_together_are_embeddings_alone(embedder):
    texts = ["The meaning of life", "A joke", "This is a long text about nothing in particular. " * 5]
    together = embedder.post("/v1/embeddings", input=texts).body["data"]
    assert [one["index"] for one in together] == [0, 1, 2]
    for text, one in zip(texts, together, strict=True):
        (alone,) = embedder.post("/v1/embeddings", input=text).body["data"]
        assert one["embedding"] == pytest.approx(alone["embedding"], abs=1e-3)


def test_openais_client_reads_both_encodings(embedder):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0)
    name = embedder.call("GET", "/v1/models").body["data"][0]["id"]
    floats = client.embeddings.create(model=name, input="A joke", encoding_format="float").data[0].embedding
    packed = embedder.post("/v1/embeddings", input="A joke", encoding_format="base64").body["data"][0]["embedding"]
    assert struct.unpack(f"<{len(floats)}f", base64.b64decode(packed)) == pytest.approx(floats, abs=1e-5)
    default = client.embeddings.create(model=name, input="A joke").data[0].embedding  # base64, which it decodes
    assert default == pytest.approx(floats, abs=1e-5)


@pytest.mark.parametrize("given", [[12, 34, 56], [[12, 34, 56], [7]], ["a", "b"]], ids=str)
def test_what_is_embedded(embedder, given):
    answer = embedder.post("/v1/embeddings", input=given)
    assert len(answer.body["data"]) == (1 if isinstance(given[0], int) else len(given))


@pytest.mark.parametrize("given", [[], None, {}, 5, [[]], [-1], [10**9]], ids=str)
def test_what_is_not_embedded(ours, given):
    answer = ours.post("/v1/embeddings", input=given)
    assert answer.status == 400
    assert answer.error["param"].startswith("input")


def test_an_encoding_that_is_none_is_refused(server):
    assert server.post("/v1/embeddings", input="x", encoding_format="gzip").status in (400, 501)


def test_a_text_beyond_the_context_is_not_embedded(embedder):
    assert embedder.post("/v1/embeddings", input="word " * 9000).status in (400, 500)


def test_health(server):
    assert server.call("GET", "/health").status == 200


METRICS = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "prefix_cache_hits_total",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "prefix_cache_queries_total",
]


def test_metrics_have_vllms_names_and_move(ours):
    def values():
        return {name: ours.metric(name) for name in METRICS}

    ours.chat(max_tokens=8, ignore_eos=True)
    ours.wait_until_idle()
    before = values()
    ours.chat(max_tokens=8, ignore_eos=True)
    ours.wait_until_idle()
    after = values()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 8
    assert after["request_success_total"] - before["request_success_total"] == 1
    assert after["prompt_tokens_total"] > before["prompt_tokens_total"]
    answer = ours.call("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'finished_reason="length"' in answer.text


def test_the_document_names_every_operation(ours):
    paths = ours.call("GET", "/openapi.json").body["paths"]
    wanted = {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
        "/health",
        "/metrics",
    }
    assert wanted <= set(paths)


def test_the_page_is_there(ours):
    answer = ours.call("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/chat", "/../etc/passwd", "/page/..%2f..%2fetc/passwd"])
def test_a_path_that_is_none(ours, path):
    answer = ours.call("GET", path)
    assert answer.status == 404
    assert answer.error
