"""Adapters: list, read, download, deploy, undeploy."""

from typing import Annotated

from fastapi import APIRouter, Body, Query
from pydantic import Field
from starlette.responses import StreamingResponse

from api.archive import stream_archive
from api.auth import SecuredRoute, needs
from api.deps import AdapterId, CallerDep, Cursor, Limit, ServicesDep, page
from api.errors import secured
from core.errors import Unavailable
from core.records import AdapterRecord, Page
from core.spec import Frozen
from store import adapters, audit, files

router = APIRouter(tags=["adapters"], route_class=SecuredRoute)

Version = Annotated[int | None, Query(ge=1, le=2**31 - 1, description="Default: the newest.")]


class DeployRequest(Frozen):
    version: int | None = Field(default=None, ge=1, le=2**31 - 1, description="Default: the newest.")


class UndeployRequest(Frozen):
    version: int | None = Field(default=None, ge=1, le=2**31 - 1, description="Default: all of them.")


_VERSION_EXAMPLES = {
    "default": {"summary": "The newest version (undeploy: all)", "value": {}},
    "one": {"summary": "One version", "value": {"version": 1}},
}


@router.get("/adapters", dependencies=[needs("adapters:read")], responses=secured(404))
def list_adapters(services: ServicesDep, caller: CallerDep, cursor: Cursor = None, limit: Limit = 20) -> Page[AdapterRecord]:
    """Newest first, each with its versions and what the endpoints said of them."""
    with services.database.transaction() as session:
        rows = adapters.list_adapters(session, caller.project_id, cursor=cursor, limit=limit)
        return page(rows, limit, lambda shown: adapters.adapter_records(session, shown), lambda row: row.id)


@router.get("/adapters/{adapter_id}", dependencies=[needs("adapters:read")], responses=secured(404))
def get_adapter(services: ServicesDep, caller: CallerDep, adapter_id: AdapterId) -> AdapterRecord:
    with services.database.transaction() as session:
        [record] = adapters.adapter_records(session, [adapters.find_adapter(session, caller.project_id, adapter_id)])
    return record


@router.get(
    "/adapters/{adapter_id}/download",
    response_class=StreamingResponse,
    dependencies=[needs("adapters:read")],
    responses={
        **secured(404),
        200: {
            "description": "The adapter's folder, manifest included.",
            "content": {"application/gzip": {"schema": {"type": "string", "format": "binary"}}},
        },
    },
)
def download_adapter(
    services: ServicesDep, caller: CallerDep, adapter_id: AdapterId, version: Version = None
) -> StreamingResponse:
    """One .tar.gz that peft (LoRA) or transformers (full model) reads as it is; the same version gives the same bytes."""
    with services.database.transaction() as session:
        row = adapters.find_version(session, caller.project_id, adapter_id, version)
        root = f"{adapters.find_adapter(session, caller.project_id, adapter_id).name}-v{row.version}"
    key = files.adapter_key(row.sha256)
    try:
        names = services.storage.folder_files(key)
    except FileNotFoundError:
        raise Unavailable("The adapter's files can't be reached right now") from None
    headers = {"Content-Disposition": f'attachment; filename="{root}.tar.gz"', "ETag": f'"{row.sha256}"'}
    return StreamingResponse(stream_archive(services.storage, key, names, root), 200, headers, "application/gzip")


@router.post("/adapters/{adapter_id}/deploy", dependencies=[needs("adapters:write")], responses=secured(404, 409, 413, 415))
def deploy_adapter(
    services: ServicesDep,
    caller: CallerDep,
    adapter_id: AdapterId,
    body: Annotated[DeployRequest, Body(openapi_examples=_VERSION_EXAMPLES)],
) -> AdapterRecord:
    """Have a version served by every endpoint that holds its base. `servable_on` names those whose checks it has passed."""
    with services.database.transaction() as session:
        version = adapters.deploy(session, caller.project_id, adapter_id, body.version)
        audit.record(session, caller.project_id, caller.key_id, "adapter.deploy", adapter_id, version=version)
        [record] = adapters.adapter_records(session, [adapters.find_adapter(session, caller.project_id, adapter_id)])
    return record


@router.post("/adapters/{adapter_id}/undeploy", dependencies=[needs("adapters:write")], responses=secured(404, 413, 415))
def undeploy_adapter(
    services: ServicesDep,
    caller: CallerDep,
    adapter_id: AdapterId,
    body: Annotated[UndeployRequest, Body(openapi_examples=_VERSION_EXAMPLES)],
) -> AdapterRecord:
    """Have a version, or the whole adapter, served no longer. One that was not deployed is no error."""
    with services.database.transaction() as session:
        versions = adapters.undeploy(session, caller.project_id, adapter_id, body.version)
        audit.record(session, caller.project_id, caller.key_id, "adapter.undeploy", adapter_id, versions=versions)
        [record] = adapters.adapter_records(session, [adapters.find_adapter(session, caller.project_id, adapter_id)])
    return record
