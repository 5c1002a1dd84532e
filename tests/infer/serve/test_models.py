"""What the server says of itself: its models, its health, its document."""


def test_the_models_are_listed_and_found_by_name(client, served):
    listed = client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == [served.name]
    assert client.get(f"/v1/models/{served.name}").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == served.capacity
    missing = client.get("/v1/models/gpt-4")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_health_is_that_of_the_engine(client):
    assert client.get("/health").json() == {"status": "ok"}


def test_the_document_has_every_route_and_resolves(client):
    document = client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/openapi.json"} <= set(
        document["paths"]
    )

    def references(part):
        if isinstance(part, dict):
            yield from ([part["$ref"]] if "$ref" in part else [])
            for value in part.values():
                yield from references(value)
        elif isinstance(part, list):
            for value in part:
                yield from references(value)

    schemas = document["components"]["schemas"]
    assert {name.removeprefix("#/components/schemas/") for name in references(document)} <= set(schemas)
