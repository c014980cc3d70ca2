"""The routes of the inference endpoint that ask no model: models, health, metrics. The others have a module each."""

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import text

from core.errors import Unavailable
from serving import routes_chat, routes_generate
from serving.access import CallerDep, CollectorDep, ServingDep
from serving.schemas import ERROR_RESPONSES, ModelLine, ModelList

router = APIRouter()
router.include_router(routes_generate.router)
router.include_router(routes_chat.router)


@router.get("/v1/models", responses=ERROR_RESPONSES, summary="Bases, and adapters of the key's project that can be asked now")
def models(serving: ServingDep, caller: CallerDep) -> ModelList:
    return ModelList(
        data=[
            ModelLine(id=line.id, created=serving.started_at, root=line.root, parent=None if line.is_base else line.root)
            for line in serving.directory.listing(caller.project_id)
        ]
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        401: ERROR_RESPONSES[401],
        403: ERROR_RESPONSES[403],
        503: ERROR_RESPONSES[503],
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    },
    summary="Numbers per base and adapter version, for Prometheus; needs the scope metrics:read",
)
async def metrics(serving: ServingDep, caller: CollectorDep) -> Response:
    adapters = serving.directory.adapters()
    serving.meters.adapters((label, weights.staged) for label, weights in adapters if weights.staged is not None)
    return Response(serving.meters.render(serving.directory.labels()), media_type=CONTENT_TYPE_LATEST)


@router.get("/healthz", summary="The process lives", responses={500: ERROR_RESPONSES[500]})
def healthz(serving: ServingDep) -> dict[str, str]:
    if not serving.engine.is_alive:
        raise RuntimeError("the engine's thread has ended")
    return {"status": "ok"}


@router.get("/readyz", summary="Bases loaded, database reachable, deployments followed", responses={503: ERROR_RESPONSES[503]})
def readyz(serving: ServingDep) -> dict[str, str]:
    if serving.follower.problem is not None:
        raise Unavailable(f"Not ready: {serving.follower.problem}")
    with serving.database.transaction() as session:
        session.execute(text("SELECT 1"))
    return {"status": "ready"}
