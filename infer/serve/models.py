"""/v1/models and /health."""

from starlette.requests import Request

from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.types import Health, ModelCard, ModelList


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoints of models and of the server's health."""

    async def models(request: Request, body: None) -> ModelList:
        return ModelList([_card(one) for one in registry])

    async def one_model(request: Request, body: None) -> ModelCard:
        return _card(registry.get(request.path_params["model"]))

    async def health(request: Request, body: None) -> Health:
        for one in registry:
            if one.service is not None and not one.service._thread.is_alive():
                raise ApiError(503, f"the engine of {one.name!r} does not run; start the server again")
        return Health()

    return [
        Endpoint("GET", "/v1/models", models, "The models that are served.", response=ModelList),
        Endpoint("GET", "/v1/models/{model:path}", one_model, "One model.", response=ModelCard, errors=(404,)),
        Endpoint("GET", "/health", health, "Whether the server works.", response=Health, errors=(503,)),
    ]


def _card(one: Served) -> ModelCard:
    return ModelCard(one.name, one.created, one.capacity, one.config.vocab_size, root=one.name)
