"""The application: the routes of all modules, errors in one form, and the models' engines while it runs."""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from infer.serve import assets, chat, completions, conversations, embeddings, metrics, models, openapi, tokens
from infer.serve.endpoint import Endpoint
from infer.serve.errors import HANDLERS
from infer.serve.security import middleware
from infer.serve.served import Registry
from infer.serve.settings import Settings

MODULES = (chat, completions, embeddings, models, tokens, metrics, conversations, assets)


def create_app(registry: Registry, settings: Settings = Settings()) -> Starlette:
    """Return the application. The models' engines must run (`with registry:`) while it answers."""
    given: list[Endpoint | BaseRoute] = [one for module in MODULES for one in module.routes(registry, settings)]
    endpoints = [one for one in given if isinstance(one, Endpoint)]
    endpoints.append(openapi.endpoint_of(endpoints, keys=bool(settings.api_keys)))
    routes: Sequence[BaseRoute] = [one.route() for one in endpoints]
    routes = [*routes, *(one for one in given if not isinstance(one, Endpoint))]
    return Starlette(routes=routes, exception_handlers=HANDLERS, middleware=middleware(settings))
