"""Datasets: upload, list, read, report, delete. Bytes are stored and accepted first; the preparer reads them later."""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from api.auth import SecuredRoute, needs
from api.deps import CallerDep, Cursor, DatasetId, Limit, ServicesDep, page
from api.errors import secured
from api.services import Services
from api.upload import Upload, receive_file
from core.errors import Conflict
from core.records import DatasetRecord, DatasetReport, Page
from store import audit, datasets, files
from store.ids import new_id
from store.keys import Caller

router = APIRouter(tags=["datasets"], route_class=SecuredRoute)

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "name": {"type": "string", "minLength": 1, "maxLength": 128, "description": "Default: the file's name."},
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSON, JSONL or CSV, in UTF-8: conversations, preferences or plain texts. "
                            "Or an archive (zip, tar, tar.gz) of pictures with their annotations.",
                        },
                    },
                },
                "example": {
                    "name": "sums",
                    "file": '{"instruction": "Add 2 and 3.", "input": "", "output": "The sum is 5."}\n',
                },
            }
        },
    }
}


@router.post(
    "/datasets",
    status_code=201,
    dependencies=[needs("datasets:write")],
    responses=secured(408, 413, 415),
    openapi_extra=_FORM,
)
async def upload_dataset(request: Request, services: ServicesDep, caller: CallerDep) -> DatasetRecord:
    """Upload one file. It is validated afterwards: poll the dataset until its status is `ready` or `failed`."""
    async with receive_file(request, services.uploads, max_bytes=services.settings.upload_max_bytes) as upload:
        return await run_in_threadpool(_store, services, caller, upload)


@router.get("/datasets", dependencies=[needs("datasets:read")], responses=secured(404))
def list_datasets(services: ServicesDep, caller: CallerDep, cursor: Cursor = None, limit: Limit = 20) -> Page[DatasetRecord]:
    """Newest first."""
    with services.database.transaction() as session:
        rows = datasets.list_datasets(session, caller.project_id, cursor=cursor, limit=limit)
        return page(rows, limit, lambda shown: [datasets.dataset_record(row) for row in shown], lambda row: row.id)


@router.get("/datasets/{dataset_id}", dependencies=[needs("datasets:read")], responses=secured(404))
def get_dataset(services: ServicesDep, caller: CallerDep, dataset_id: DatasetId) -> DatasetRecord:
    with services.database.transaction() as session:
        return datasets.dataset_record(datasets.find_dataset(session, caller.project_id, dataset_id))


@router.get("/datasets/{dataset_id}/report", dependencies=[needs("datasets:read")], responses=secured(404, 409))
def get_report(services: ServicesDep, caller: CallerDep, dataset_id: DatasetId) -> DatasetReport:
    """What the preparer found, row by row. 409 until it has read the file."""
    with services.database.transaction() as session:
        record = datasets.dataset_record(datasets.find_dataset(session, caller.project_id, dataset_id))
    if record.report is None:
        raise Conflict("The dataset has not been validated yet; look again when its status is ready or failed")
    return record.report


@router.delete("/datasets/{dataset_id}", status_code=204, dependencies=[needs("datasets:write")], responses=secured(404, 409))
def delete_dataset(services: ServicesDep, caller: CallerDep, dataset_id: DatasetId) -> None:
    """Delete a dataset and its files. 409 while a job that has not ended reads it."""
    with services.database.transaction() as session:
        datasets.delete_dataset(session, caller.project_id, dataset_id)
        audit.record(session, caller.project_id, caller.key_id, "dataset.delete", dataset_id)
    services.storage.delete(f"datasets/{dataset_id}")


def _store(services: Services, caller: Caller, upload: Upload) -> DatasetRecord:
    """File first, then the row and its bell in one transaction, then the ring: at no moment does a row lack its file."""
    dataset_id = new_id("ds")
    services.storage.put_file(upload.path, files.upload_key(dataset_id), move=True)
    try:
        with services.database.transaction() as session:
            dataset, bell = datasets.create_dataset(
                session,
                caller.project_id,
                dataset_id,
                name=upload.name or upload.filename,
                filename=upload.filename,
                size=upload.size,
                sha256=upload.sha256,
            )
            audit.record(session, caller.project_id, caller.key_id, "dataset.create", dataset_id, sha256=upload.sha256)
            record = datasets.dataset_record(dataset)
    except BaseException:
        services.storage.delete(f"datasets/{dataset_id}")
        raise
    services.doorbell.ring([bell])
    return record
