"""One table: what went wrong to status and body, in the shape that OpenAI's clients read.

Their client retries 409, 429 and 5xx by itself, so a refusal that will not pass is never one of these.
"""

import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException

from core.errors import Forbidden, NotFound, Unauthenticated, Unavailable, UserError
from core.infer.engine import QueueFull
from serving.schemas import ErrorBody, ErrorObject

logger = logging.getLogger(__name__)

_STATUS: list[tuple[type[UserError], int, str, str]] = [
    (Unauthenticated, 401, "authentication_error", "invalid_api_key"),
    (Forbidden, 403, "permission_error", "insufficient_scope"),
    (NotFound, 404, "not_found_error", "not_found"),
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (Unavailable, 503, "server_error", "unavailable"),
    (UserError, 400, "invalid_request_error", "invalid_request"),
]
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "2"}}


def error_response(
    status: int,
    message: str,
    kind: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    body = ErrorBody(error=ErrorObject(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status, headers={**_HEADERS.get(status, {}), **(headers or {})})


def install_handlers(app: FastAPI) -> None:
    """Give every error of every route the one shape."""
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    for fault in (OperationalError, InterfaceError, TimeoutError):
        app.add_exception_handler(fault, _database_error)
    app.add_exception_handler(Exception, _unexpected)


def _user_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UserError)
    status, kind, code = next(entry[1:] for entry in _STATUS if isinstance(error, entry[0]))
    problem = error.problems[0] if error.problems else None
    param = problem.pointer.strip("/").replace("/", ".") if problem and problem.pointer else None
    if problem is not None and status in (400, 404, 503):
        code = problem.code.replace("-", "_")
    return error_response(status, error.detail, kind, code=code, param=param)


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # The input itself is not repeated: it may be large, or hold what can't be written as JSON.
    problems = [(_place(one["loc"]), _reason(one)) for one in error.errors()]
    message = "; ".join(f"{place}: {reason}" if place else reason for place, reason in problems)
    is_unparsable = any(one["type"] == "json_invalid" for one in error.errors())
    is_role = any(re.fullmatch(r"messages\.\d+\.role", place) for place, _ in problems)
    code = "invalid_json" if is_unparsable else "invalid_role" if is_role else "invalid_request"
    return error_response(400, message, "invalid_request_error", code=code, param=problems[0][0] or None)


def _reason(one: Any) -> str:
    if one["type"] == "extra_forbidden":
        return "is not supported"
    return str(one["msg"]).removeprefix("Value error, ")


def _place(location: Any) -> str:
    # (body, stop, list[...], 3): the parts in between are names of alternatives in a union, not of fields.
    parts = [part for part in location[1:] if isinstance(part, int) or (str(part).isidentifier() and part != "str")]
    return ".".join(map(str, parts))


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large"}
    messages = {
        404: f"There is no {request.method} {request.url.path}",
        405: f"{request.url.path} does not answer {request.method}",
    }
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return error_response(
        error.status_code,
        messages.get(error.status_code, str(error.detail)),
        kind,
        code=codes.get(error.status_code),
        headers=dict(error.headers or {}),
    )


def _database_error(request: Request, error: Exception) -> JSONResponse:
    logger.warning("the database can't be reached: %s", error)
    return error_response(503, "The database can't be reached", "server_error", code="unavailable")


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return error_response(500, "The endpoint failed on this request; its log has the reason", "server_error")
