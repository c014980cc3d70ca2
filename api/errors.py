"""Errors on the wire: one table from error class to status, one shape (RFC 9457, application/problem+json) for all of them.

`errors` lists every reason with its place: a JSON pointer into the body, or a field, row or line. No answer holds a trace, a
path of the machine, SQL, or another project's ids.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from api import pointers
from core import errors
from core.errors import Problem, UserError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5
SHOWN_ERRORS = 100

STATUSES: dict[type[UserError], int] = {
    errors.Unparsable: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.InvalidInput: 422,
    errors.Unavailable: 503,
}

PROBLEMS: dict[str, tuple[int, str, str]] = {
    **{error.code: (status, error.title, error.__doc__ or "") for error, status in STATUSES.items()},
    "bad-host": (400, "Unknown host name", "The Host header names a machine this service does not answer for."),
    "method-not-allowed": (405, "Method not allowed", "The Allow header names the methods of this resource."),
    "not-acceptable": (406, "No such representation", "The Accept header asks for a media type this resource does not have."),
    "timeout": (408, "The request took too long to arrive", "Nothing of it was kept; send it again."),
    "unsupported-media-type": (415, "The body's media type is not read here", "The OpenAPI page names the one that is."),
    "internal-error": (500, "The service failed", "Not your mistake. The operator finds it in the log under the instance's id."),
}
"""Problem code -> (status, title, advice). `/problems/<code>` shows an entry."""

_ADVICE = {
    "unparsable": "Mend the syntax; nothing was read.",
    "unauthenticated": "Send a valid key as `Authorization: Bearer strop_sk_...`.",
    "forbidden": "Use a key that has the scope named in the errors.",
    "not-found": "It does not exist, or belongs to another project.",
    "conflict": "Look at the object's state and try what that state allows.",
    "too-large": "Send less; the detail names the limit.",
    "invalid-input": "The errors name every place at once.",
    "unavailable": "Send the request again after Retry-After seconds.",
}
PROBLEMS |= {code: (*PROBLEMS[code][:2], advice) for code, advice in _ADVICE.items()}
_CODE_OF_STATUS = {status: code for code, (status, _, _) in reversed(PROBLEMS.items()) if code != "bad-host"}


class ProblemItem(BaseModel):
    """One thing wrong, and where."""

    code: str
    message: str
    pointer: str | None = Field(default=None, description="JSON pointer into the body (RFC 6901).")
    field: str | None = Field(default=None, description="Name of a parameter, header or form field.")
    row: int | None = None
    line: int | None = None


class ProblemDetails(BaseModel):
    """RFC 9457."""

    type: str = Field(description="A stable path on this service that describes the kind of problem.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request's id, as in the X-Request-ID header and the service's log.")
    errors: list[ProblemItem] = Field(description=f"Every reason, cut at {SHOWN_ERRORS}.")
    error_count: int = Field(description="How many reasons there are.")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: these statuses, and those that every route may answer."""
    titles: dict[int, list[str]] = {}
    for status, title, _ in PROBLEMS.values():
        titles.setdefault(status, []).append(title)
    schema = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}
    return {
        status: {"description": " / ".join(titles[status]), "content": {MEDIA_TYPE: schema}}
        for status in sorted({400, 500, 503, *statuses})
    }


def secured(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route that needs a key."""
    return documented(401, 403, 422, *statuses)


def problem_response(
    request_id: str,
    code: str,
    detail: str,
    problems: Sequence[Problem] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer of one of the PROBLEMS."""
    status, title, _ = PROBLEMS[code]
    sent = dict(headers or {})
    if status == 401:
        sent["WWW-Authenticate"] = 'Bearer realm="strop"'
    if status == 503:
        sent.setdefault("Retry-After", str(RETRY_SECONDS))
    body = ProblemDetails(
        type=f"/problems/{code}",
        title=title,
        status=status,
        detail=detail,
        instance=request_id,
        errors=[ProblemItem(**vars(problem)) for problem in problems[:SHOWN_ERRORS]],
        error_count=len(problems),
    )
    content = body.model_dump(mode="json", exclude_none=True)
    return Response(_json(content), status, sent, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Replace every error shape of the framework by ours."""
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    for away in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(away, _database_away)


def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    code = next(cls.code for cls in type(error).__mro__ if cls in STATUSES)
    return problem_response(_id(request), code, error.detail, error.problems)


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    for entry in found:
        if entry["type"] == "json_invalid":
            place = f"at character {entry['loc'][-1]}: {entry.get('ctx', {}).get('error', '')}"
            return problem_response(_id(request), "unparsable", f"The body is not JSON, {place}")
    if isinstance(error.body, bytes):
        return problem_response(_id(request), "unsupported-media-type", "Send the body as application/json")
    field = getattr(request.scope.get("route"), "body_field", None)
    schema = {} if field is None else pointers.schema_of(field.field_info.annotation)
    problems = [pointers.problem_of(entry, error.body, schema) for entry in found]
    count = "One value is" if len(problems) == 1 else f"{len(problems)} values are"
    return problem_response(_id(request), "invalid-input", f"{count} not what this operation takes", problems)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODE_OF_STATUS.get(error.status_code, "invalid-input" if error.status_code < 500 else "internal-error")
    detail = {
        404: f"There is nothing at {request.url.path}",
        405: f"{request.method} is not a method of {request.url.path}",
        413: "The body is larger than this operation takes",
    }.get(error.status_code, str(error.detail))
    return problem_response(_id(request), code, detail, headers=error.headers)


def _database_away(request: Request, error: Exception) -> Response:
    log.warning("%s: the database is away: %s", _id(request), error)
    return problem_response(_id(request), "unavailable", "The database does not answer right now")


def _id(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


def _json(content: dict[str, Any]) -> bytes:
    # A lone surrogate of the request may stand in a message; it has no UTF-8 form.
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
