"""Base models on offer. They are registered by the operator (`python -m store.admin models`), never over REST."""

from typing import Annotated

from fastapi import APIRouter, Path

from api.auth import SecuredRoute, needs
from api.deps import CallerDep, ServicesDep
from api.errors import secured
from core.records import ModelRecord, Page
from store import models

router = APIRouter(tags=["models"], route_class=SecuredRoute)


@router.get("/models", dependencies=[needs("models:read")], responses=secured())
def list_models(services: ServicesDep, _: CallerDep) -> Page[ModelRecord]:
    """All of them, by name."""
    with services.database.transaction() as session:
        return Page[ModelRecord](data=[models.model_record(row) for row in models.list_models(session)], has_more=False)


@router.get("/models/{name:path}", dependencies=[needs("models:read")], responses=secured(404))
def get_model(
    services: ServicesDep,
    _: CallerDep,
    name: Annotated[str, Path(pattern=r"^[A-Za-z0-9._/-]{1,200}$", examples=["SmolLM2-135M-Instruct"])],
) -> ModelRecord:
    """A name may hold one slash, as on the Hugging Face hub."""
    with services.database.transaction() as session:
        return models.model_record(models.find_model(session, name))
