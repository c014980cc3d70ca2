"""What happened to a job: its events (JSON or live), the log of its runs, its checkpoints."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api import tail, wire
from api.auth import SecuredRoute, needs
from api.deps import CallerDep, JobId, Limit, ServicesDep
from api.errors import secured
from api.routes.metrics import LastEventId
from core.records import CheckpointRecord, EventRecord, Page
from store import adapters, events, files, jobs
from store.events import START, parse_place

router = APIRouter(tags=["jobs"], route_class=SecuredRoute)

_STREAM_EXAMPLE = 'event: status\nid: 1-1\ndata: {"id": "1-1", "kind": "status", "data": {"status": "running"}, ...}\n\n'


@router.get(
    "/jobs/{job_id}/events",
    response_model=Page[EventRecord],
    dependencies=[needs("jobs:read")],
    responses={
        **secured(404, 406),
        200: {"content": {wire.SSE: {"schema": {"type": "string"}, "example": _STREAM_EXAMPLE}}},
    },
)
def get_events(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    job_id: JobId,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before, or the id of any event.")] = None,
    limit: Limit = 100,
    last_event_id: LastEventId = None,
) -> Response:
    """Oldest first, all attempts. With `Accept: text/event-stream` live until the job has ended, from `Last-Event-ID` on."""
    wanted = wire.negotiate(request, (wire.JSON, wire.SSE))
    after = last_event_id if wanted == wire.SSE and last_event_id is not None else cursor
    place = START if after is None else parse_place(after)
    with services.database.transaction() as session:
        jobs.find_job(session, caller.project_id, job_id)
        found = [] if wanted == wire.SSE else events.after(session, job_id, place, limit=limit + 1)
    if wanted == wire.SSE:
        return wire.event_stream(tail.follow(services, caller.project_id, job_id, place), None, _live_data)
    has_more = len(found) > limit
    shown = found[:limit]
    next_cursor = shown[-1].id if has_more else None
    return wire.json_response(Page[EventRecord](data=shown, has_more=has_more, next_cursor=next_cursor))


@router.get(
    "/jobs/{job_id}/logs",
    response_class=Response,
    dependencies=[needs("jobs:read")],
    responses={
        **secured(404),
        200: {"description": "A piece of the log.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    },
)
def get_log(
    services: ServicesDep,
    caller: CallerDep,
    job_id: JobId,
    attempt: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Default: the latest.")] = None,
    offset: Annotated[int, Query(ge=0, le=2**53, description="First byte.")] = 0,
    limit: Annotated[int, Query(ge=1, le=4 << 20, description="Bytes.")] = 1 << 20,
) -> Response:
    """What a run's process printed, as far as it was stored: every few seconds while it runs. Empty while there is nothing.

    Go on at the byte that `X-Next-Offset` names.
    """
    with services.database.transaction() as session:
        job = jobs.find_job(session, caller.project_id, job_id)
        latest = job.fence
    piece = services.storage.read_range(files.log_key(job_id, latest if attempt is None else attempt), offset, limit)
    return Response(piece, headers={"X-Next-Offset": str(offset + len(piece))}, media_type="text/plain; charset=utf-8")


@router.get("/jobs/{job_id}/checkpoints", dependencies=[needs("jobs:read")], responses=secured(404))
def get_checkpoints(services: ServicesDep, caller: CallerDep, job_id: JobId) -> Page[CheckpointRecord]:
    """Checkpoints that stand, newest first; a later attempt resumes from the first of them."""
    with services.database.transaction() as session:
        jobs.find_job(session, caller.project_id, job_id)
        return Page[CheckpointRecord](data=adapters.list_checkpoints(session, job_id), has_more=False)


def _live_data(event: EventRecord) -> dict[str, Any]:
    return event.model_dump(mode="json")
