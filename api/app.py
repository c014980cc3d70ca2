"""The control plane: `uvicorn api.app:create_app --factory`. Any number of these stand behind one load balancer.

It keeps no state, imports no torch, and starts before Postgres and Redis answer (/readyz tells).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from api import errors, pages
from api.errors import ProblemDetails
from api.meters import Meters
from api.middleware import Envelope
from api.routes import adapters, datasets, events, health, jobs, metrics, models
from api.services import open_services
from store.settings import Settings, get_settings

_DESCRIPTION = """Fine-tuning jobs: upload a dataset, submit a job, watch it, deploy what it made.

Every operation but the health checks needs an API key (*Authorize*, above). Every error is an
[RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problem that names all reasons at once."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; settings default to the process's own."""
    settings = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings) as services:
            app.state.services = services
            yield

    app = _Service(
        title="strop",
        version=_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be built from the Host header
    )
    app.state.meters = Meters()
    app.add_middleware(
        Envelope,
        allowed_hosts=settings.allowed_hosts,
        upload_max_bytes=settings.upload_max_bytes,
        meters=app.state.meters,
    )
    errors.install(app)
    for module in (datasets, jobs, metrics, events, adapters, models, health):
        app.include_router(module.router)
    app.include_router(health.secured_router)
    app.include_router(pages.router)
    pages.mount_assets(app)
    return app


class _Service(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The page's source, with the one error shape that all routes name, and without the framework's own."""
        if self.openapi_schema is None:
            schema = get_openapi(title=self.title, version=self.version, description=self.description, routes=self.routes)
            _, definitions = models_json_schema([(ProblemDetails, "serialization")], ref_template="#/components/schemas/{model}")
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components |= definitions["$defs"]
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
            self.openapi_schema = schema
        return self.openapi_schema


def _version() -> str:
    try:
        return version("strop")
    except PackageNotFoundError:  # a checkout that was not installed
        return "0"
