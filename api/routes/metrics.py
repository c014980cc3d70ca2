"""A job's curves: as JSON points, as CSV, or live as server-sent events, by the Accept header."""

import csv
import io
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel

from api import tail, wire
from api.auth import SecuredRoute, needs
from api.deps import Attempt, CallerDep, JobId, ServicesDep
from api.errors import secured
from core.events import METRICS
from core.records import EventRecord, MetricPoint
from store import events, jobs
from store.events import START, parse_place

router = APIRouter(tags=["jobs"], route_class=SecuredRoute)

_COLUMNS = ("step", "attempt", *(name for names in METRICS.values() for name in names))
_LIVE_KINDS = frozenset({*METRICS, "status"})
_STREAM_EXAMPLE = 'event: step\nid: 1-7\ndata: {"attempt": 1, "at": "2026-01-01T12:00:00Z", "step": 3, "loss": 1.84, ...}\n\n'
LastEventId = Annotated[
    str | None, Header(description="`<attempt>-<seq>` of the last event received; the stream goes on after it.")
]


class MetricsPage(BaseModel):
    """Points in the order of their steps. Go on with the last step as `after_step` while `has_more`."""

    data: list[MetricPoint]
    has_more: bool


@router.get(
    "/jobs/{job_id}/metrics",
    response_model=MetricsPage,
    dependencies=[needs("jobs:read")],
    responses={
        **secured(404, 406),
        200: {
            "description": "Points by step; live, one event per optimizer step, evaluation and change of status.",
            "content": {
                wire.CSV: {"schema": {"type": "string"}, "example": ",".join(_COLUMNS) + "\n"},
                wire.SSE: {"schema": {"type": "string"}, "example": _STREAM_EXAMPLE},
            },
        },
    },
)
def get_metrics(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    job_id: JobId,
    after_step: Annotated[int, Query(ge=-1, le=2**31 - 1, description="Only steps behind this one.")] = -1,
    attempt: Attempt = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Steps per page; a live stream has no pages.")] = 1000,
    last_event_id: LastEventId = None,
) -> Response:
    """Each step's values come from the highest attempt that reached it; `?attempt=` shows one.

    With `Accept: text/event-stream` the history and then every new value is sent as it is made, attempt by attempt, until the
    job has ended; `Last-Event-ID` goes on where a cut connection was.
    """
    wanted = wire.negotiate(request, (wire.JSON, wire.CSV, wire.SSE))
    place = START if last_event_id is None else parse_place(last_event_id)
    with services.database.transaction() as session:
        jobs.find_job(session, caller.project_id, job_id)
        points = []
        if wanted != wire.SSE:
            points = events.curves(session, job_id, after_step=after_step, attempt=attempt, limit=limit + 1)
    if wanted == wire.SSE:
        return wire.event_stream(tail.follow(services, caller.project_id, job_id, place), _LIVE_KINDS, _live_data)
    if wanted == wire.CSV:
        headers = {"Content-Disposition": f'attachment; filename="{job_id}-metrics.csv"'}
        return Response(_csv(points[:limit]), headers=headers, media_type=wire.CSV)
    return wire.json_response(MetricsPage(data=points[:limit], has_more=len(points) > limit))


def _live_data(event: EventRecord) -> dict[str, Any]:
    names = METRICS.get(event.kind)
    data = event.data if names is None else {name: event.data.get(name) for name in ("step", *names)}
    return {"attempt": parse_place(event.id).attempt, "at": event.at.isoformat(), **data}


def _csv(points: list[MetricPoint]) -> str:
    """Numbers only, so no cell can be taken for a formula."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.model_dump() for point in points)
    return out.getvalue()
