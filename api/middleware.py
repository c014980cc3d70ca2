"""The envelope of every request and answer: id, host, body cap, headers, count, and the last net under unexpected errors.

Plain ASGI, so that streams pass through it piece by piece.
"""

import logging
import re
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import problem_response
from api.meters import Meters
from store.ids import new_id

log = logging.getLogger(__name__)

JSON_BODY_BYTES = 256 << 10
UPLOAD_PATH = "/datasets"
_FORM_BYTES = 1 << 20  # what a multipart form may add to the file it carries
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class Envelope:
    """Wraps the application. `allowed_hosts` are answered besides the loopback names; `*` is any."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: Iterable[str], upload_max_bytes: int, meters: Meters) -> None:
        self._app = app
        self._hosts = _LOCAL_HOSTS | {host.lower() for host in allowed_hosts}
        self._upload_bytes = upload_max_bytes + _FORM_BYTES
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        begun = time.perf_counter()
        status = 0

        async def send_wrapped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["X-Request-ID"] = request_id
                for name, value in _HEADERS.items():
                    answered.setdefault(name, value)
            await send(message)

        try:
            await self._answer(scope, receive, send_wrapped, headers, request_id)
        except Exception:
            log.exception("%s %s %s failed", request_id, scope["method"], scope["path"])
            if status:
                raise  # too late for an answer: the server cuts the connection, which the client sees
            detail = "The service failed on this request; its log has the reason under this id"
            await problem_response(request_id, "internal-error", detail)(scope, receive, send_wrapped)
        finally:
            route = getattr(scope.get("route"), "path", "(none)")
            self._meters.count(scope["method"], route, status, time.perf_counter() - begun)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str) -> None:
        host = headers.get("host", "").lower()
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if "*" not in self._hosts and name not in self._hosts:
            detail = "This service does not answer for the host name of the request (STROP_ALLOWED_HOSTS lists those it does)"
            await problem_response(request_id, "bad-host", detail)(scope, receive, send)
            return
        limit = self._upload_bytes if scope["path"] == UPLOAD_PATH else JSON_BODY_BYTES
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            detail = f"The body has {declared} bytes, and this operation takes at most {limit}"
            refusal = problem_response(request_id, "too-large", detail, headers={"Connection": "close"})
            await refusal(scope, receive, send)
            return
        read = 0

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, headers={"Connection": "close"})
            return message

        await self._app(scope, receive_counted, send)
