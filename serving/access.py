"""What the routes work with, and who may use them."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from core.errors import Unauthenticated
from core.infer.engine import Engine
from serving.deployments import Follower
from serving.directory import Directory
from serving.meters import Meters
from store.db import Database
from store.keys import Caller, authenticate

_bearer = HTTPBearer(auto_error=False, description="A strop API key with the scope models:infer.")


@dataclass(frozen=True)
class Serving:
    """On `app.state.serving`."""

    database: Database
    pepper: bytes
    engine: Engine
    directory: Directory
    follower: Follower
    started_at: int
    meters: Meters = field(default_factory=Meters)


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


ServingDep = Annotated[Serving, Depends(_serving)]


def _any_caller(serving: ServingDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    if credentials is None:
        raise Unauthenticated("Send an API key: Authorization: Bearer strop_sk_...")
    with serving.database.transaction() as session:
        return authenticate(session, serving.pepper, credentials.credentials)


def _asker(caller: Annotated[Caller, Depends(_any_caller)]) -> Caller:
    caller.require("models:infer")
    return caller


def _collector(caller: Annotated[Caller, Depends(_any_caller)]) -> Caller:
    caller.require("metrics:read")
    return caller


CallerDep = Annotated[Caller, Depends(_asker)]
CollectorDep = Annotated[Caller, Depends(_collector)]
