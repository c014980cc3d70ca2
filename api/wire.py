"""Representations: which media type the client wants, and events as server-sent events (WHATWG HTML, section 9.2)."""

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from core.records import EventRecord

JSON = "application/json"
CSV = "text/csv"
SSE = "text/event-stream"

_PING_SECONDS = 15.0
_RECONNECT_MILLISECONDS = 1000


def negotiate(request: Request, offers: tuple[str, ...]) -> str:
    """The offer the Accept header likes best; the first one when it does not care. Raises a 406."""
    best, best_quality = None, 0.0
    ranges = [_media_range(part) for part in request.headers.get("accept", "*/*").split(",")]
    for offer in offers:
        # The most specific range that covers an offer decides about it (RFC 9110, 12.5.1).
        matching = [(name.count("*"), -quality) for name, quality in ranges if _covers(name, offer)]
        quality = -min(matching)[1] if matching else 0.0
        if quality > best_quality:
            best, best_quality = offer, quality
    if best is None:
        raise HTTPException(406, f"This resource comes as {', '.join(offers)}")
    return best


def json_response(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type=JSON)


def event_stream(
    events: AsyncIterator[EventRecord | None],
    kinds: frozenset[str] | None,
    data: Callable[[EventRecord], dict[str, Any]],
) -> Response:
    """A live stream: `event` is the kind, `id` the place, `data` one JSON object. Only of `kinds`, where any are named."""

    async def encoded() -> AsyncIterator[bytes]:
        yield format_sse_event(retry=_RECONNECT_MILLISECONDS)  # at once, so that the client sees the answer begin
        sent_at = time.monotonic()
        async for event in events:
            if event is not None and (kinds is None or event.kind in kinds):
                yield format_sse_event(data_str=json.dumps(data(event)), event=event.kind, id=event.id)
                sent_at = time.monotonic()
            elif time.monotonic() - sent_at > _PING_SECONDS:
                yield KEEPALIVE_COMMENT
                sent_at = time.monotonic()

    return StreamingResponse(encoded(), media_type=SSE, headers={"X-Accel-Buffering": "no"})


def _media_range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    return name, quality


def _covers(media_range: str, offer: str) -> bool:
    return media_range in ("*/*", "*", offer, offer.partition("/")[0] + "/*")
