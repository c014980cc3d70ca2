"""Is the process alive, may it get requests, and what Prometheus wants to know."""

import secrets
import tempfile
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from api.auth import SecuredRoute, needs
from api.deps import ServicesDep
from api.errors import documented, secured
from api.meters import Meters
from api.services import Services
from core.errors import Problem, Unavailable
from store import schema

router = APIRouter(tags=["health"])
secured_router = APIRouter(tags=["health"], route_class=SecuredRoute)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@router.get("/healthz", responses=documented())
async def is_alive() -> Health:
    """The process answers. Asks nothing of anyone else."""
    return Health()


@router.get("/readyz", responses=documented())
async def is_ready(services: ServicesDep) -> Health:
    """Postgres, its schema, Redis and the storage are in order; else 503, naming all that are not."""
    problems = await run_in_threadpool(_check_parts, services)
    try:
        await services.redis.ping()
    except RedisError as error:
        problems.append(Problem("redis", f"does not answer ({type(error).__name__})"))
    if problems:
        raise Unavailable("The service is not ready", problems)
    return Health()


@secured_router.get(
    "/prometheus",
    response_class=Response,
    dependencies=[needs("metrics:read")],
    responses={**secured(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_prometheus(request: Request, services: ServicesDep) -> Response:
    """Requests of this process, and jobs, queues and workers as the record has them."""
    meters: Meters = request.app.state.meters
    with services.database.transaction() as session:
        return Response(meters.render(session), media_type=CONTENT_TYPE_LATEST)


def _check_parts(services: Services) -> list[Problem]:
    problems = []
    try:
        with services.database.transaction() as session:
            revision = schema.current_revision(session)
        if revision != services.newest_revision:
            message = f"stands at {revision}, this version needs {services.newest_revision}: run `python -m store.admin migrate`"
            problems.append(Problem("migrations", message))
    except SQLAlchemyError as error:
        problems.append(Problem("postgres", f"does not answer ({type(error).__name__})"))
    key = f"probes/{secrets.token_hex(8)}"
    try:
        with tempfile.NamedTemporaryFile(dir=services.uploads, prefix="probe-") as probe:
            services.storage.put_file(Path(probe.name), key)
        services.storage.delete(key)
    except Exception as error:  # whatever a remote storage's client raises: the answer is the same
        problems.append(Problem("storage", f"can't be written ({type(error).__name__})"))
    return problems
