"""Annotated aliases that routes take: the process's services, who calls, ids and pages."""

from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Query, Request
from pydantic import BaseModel

from api.services import Services
from core.records import Page
from store.keys import Caller

T = TypeVar("T", bound=BaseModel)
Row = TypeVar("Row")


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller  # set by SecuredRoute before the body is read
    return caller


ServicesDep = Annotated[Services, Depends(_services)]
CallerDep = Annotated[Caller, Depends(_caller)]

JobId = Annotated[str, Path(pattern=r"^job_[a-z0-9]{1,40}$", examples=["job_k3v9x2m4q7w5n6p2r3t4"])]
DatasetId = Annotated[str, Path(pattern=r"^ds_[a-z0-9]{1,40}$", examples=["ds_k3v9x2m4q7w5n6p2r3t4"])]
AdapterId = Annotated[str, Path(pattern=r"^ada_[a-z0-9]{1,40}$", examples=["ada_k3v9x2m4q7w5n6p2r3t4"])]
Cursor = Annotated[
    str | None, Query(pattern=r"^[a-z]+_[a-z0-9]{1,40}$", description="`next_cursor` of the page before this one.")
]
Limit = Annotated[int, Query(ge=1, le=100, description="Entries per page.")]
Attempt = Annotated[int | None, Query(ge=0, le=2**31 - 1, description="One attempt only; default: the view over all.")]


def page(rows: list[Row], limit: int, record: Callable[[list[Row]], list[T]], row_id: Callable[[Row], str]) -> Page[T]:
    """A page of up to `limit` records out of up to `limit` + 1 rows."""
    shown = rows[:limit]
    has_more = len(rows) > limit
    return Page[T](data=record(shown), has_more=has_more, next_cursor=row_id(shown[-1]) if has_more else None)
