"""The chat page: `/` and the files under /page/, which hold nothing secret."""

import os
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from infer.serve.served import Registry
from infer.serve.settings import Settings

FOLDER = Path(__file__).parent / "page"
_CACHE = {"cache-control": "no-cache"}  # browsers ask whether a file has changed: a new version is seen at once


class _Files(StaticFiles):
    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(_CACHE)
        return response


def routes(registry: Registry, settings: Settings) -> list[BaseRoute]:
    """Return the routes of the page and of its files."""

    async def page(request: Request) -> Response:
        return FileResponse(FOLDER / "index.html", headers=_CACHE, media_type="text/html; charset=utf-8")

    async def icon(request: Request) -> Response:
        return FileResponse(FOLDER / "icon.svg", headers=_CACHE, media_type="image/svg+xml")

    return [
        Route("/", page),
        Route("/favicon.ico", icon),
        Mount("/page", _Files(directory=os.fspath(FOLDER)), name="page"),
    ]
