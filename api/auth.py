"""Who may call what: every route of a `SecuredRoute` router names one scope, and nothing of a request is read before its key.

FastAPI parses a body before it runs dependencies, so a dependency would let anyone make the service parse. A route class
stands before that. A route that forgets to name its scope does not start.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response, Security, params
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from api.services import Services
from core.errors import Unauthenticated
from store import keys
from store.keys import Caller

_bearer = HTTPBearer(
    scheme_name="ApiKey",
    bearerFormat="strop_sk_<id>_<secret>_<crc>",
    auto_error=False,
    description="An API key made with `python -m store.admin keys create`; an embedded service keeps its first one in "
    "`$STROP_HOME/api_key`.",
)


def needs(scope: str) -> Any:
    """Dependency that names a route's scope, for SecuredRoute and the OpenAPI page."""
    assert scope in keys.SCOPES, scope
    return Security(_documented, scopes=[scope])


class SecuredRoute(APIRoute):
    """Checks key and scope before the body is read, and leaves the Caller in `request.state.caller`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        scopes = [s for d in self.dependencies if isinstance(d, params.Security) for s in d.scopes or ()]
        if len(scopes) != 1:
            raise RuntimeError(f"{self.path}: a secured route names one scope, not {scopes}")
        [scope] = scopes

        async def handle_known(request: Request) -> Response:
            caller = await run_in_threadpool(authenticate, request.app.state.services, request.headers.get("authorization"))
            caller.require(scope)
            request.state.caller = caller
            return await handle(request)

        return handle_known


def authenticate(services: Services, authorization: str | None) -> Caller:
    """The caller of an Authorization header. Raises Unauthenticated."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("Send an API key as `Authorization: Bearer strop_sk_...`")
    with services.database.transaction() as session:
        caller = keys.authenticate(session, services.pepper, token.strip())
        keys.note_use(session, caller.key_id)
    return caller


def _documented(_: Annotated[Any, Depends(_bearer)]) -> None:
    """Puts the scheme and the scope on the OpenAPI page; the check itself is SecuredRoute's."""
