"""Adapters and checkpoints as the control plane sees them: read, list, deploy, undeploy. Publishing a job's
result is in `store/runs.py`.

Deploying only states a wish. Endpoints hear of it by NOTIFY when the transaction commits (and look every few seconds in any
case), check the version against its parity record, and leave receipts; `servable_on` is what they said.
"""

from collections.abc import Iterable

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.adapter import AdapterFacts
from core.errors import Conflict, NotFound
from core.records import AdapterRecord, AdapterVersionRecord, CheckpointRecord, ReceiptRecord
from store.ids import new_id
from store.nodes import LIVE_SECONDS
from store.tables import Adapter, AdapterVersion, Checkpoint, Deployment, Endpoint, Receipt

DEPLOYED = "deployed"
UNDEPLOYED = "undeployed"
CHANNEL = "strop_deployments"
"""LISTEN channel; the payload is the adapter's id."""

_RECEIPTS_SHOWN = 20


def find_adapter(session: Session, project_id: str, adapter_id: str) -> Adapter:
    """The adapter. Raises NotFound, the same for one that is not there and one of another project."""
    adapter = session.scalar(select(Adapter).where(Adapter.id == adapter_id, Adapter.project_id == project_id))
    if adapter is None:
        raise NotFound(f"There is no adapter {adapter_id}")
    return adapter


def find_version(session: Session, project_id: str, adapter_id: str, version: int | None = None) -> AdapterVersion:
    """One version, or the newest. Raises NotFound."""
    find_adapter(session, project_id, adapter_id)
    query = select(AdapterVersion).where(AdapterVersion.adapter_id == adapter_id)
    if version is not None:
        query = query.where(AdapterVersion.version == version)
    row = session.scalar(query.order_by(AdapterVersion.version.desc()).limit(1))
    if row is None:
        raise NotFound(f"Adapter {adapter_id} has no version {version}")
    return row


def list_adapters(session: Session, project_id: str, *, cursor: str | None = None, limit: int = 20) -> list[Adapter]:
    """Newest first; `cursor` is the id of the last adapter of the page before. Returns up to `limit` + 1, to tell of more."""
    query = select(Adapter).where(Adapter.project_id == project_id)
    if cursor is not None:
        last = find_adapter(session, project_id, cursor)
        query = query.where(
            (Adapter.created_at < last.created_at) | ((Adapter.created_at == last.created_at) & (Adapter.id < last.id))
        )
    return list(session.scalars(query.order_by(Adapter.created_at.desc(), Adapter.id.desc()).limit(limit + 1)))


def add_version(
    session: Session, project_id: str, name: str, *, job_id: str | None, sha256: str, size: int, facts: AdapterFacts
) -> AdapterVersion:
    """A stored folder becomes the next version of an adapter, which is made where there is none of the name."""
    adapter = session.scalar(select(Adapter).where(Adapter.project_id == project_id, Adapter.name == name).with_for_update())
    if adapter is None:
        adapter = Adapter(id=new_id("ada"), project_id=project_id, name=name)
        session.add(adapter)
        session.flush()
    last = session.scalar(select(func.max(AdapterVersion.version)).where(AdapterVersion.adapter_id == adapter.id))
    version = AdapterVersion(
        adapter_id=adapter.id,
        version=(last or 0) + 1,
        project_id=project_id,
        sha256=sha256,
        bytes=size,
        job_id=job_id,
        facts=facts.model_dump(mode="json"),
    )
    session.add(version)
    session.flush()
    return version


def deploy(session: Session, project_id: str, adapter_id: str, version: int | None) -> int:
    """Ask for a version (default: the newest) to be served. Returns its number. Again is no error.

    Raises NotFound, and Conflict for a task that endpoints do not serve.
    """
    row = find_version(session, project_id, adapter_id, version)
    task = AdapterFacts.model_validate(row.facts).task
    if task != "causal_lm":
        raise Conflict(f"Version {row.version} is of task {task}, which endpoints do not serve yet: download it")
    _wish(session, row, DEPLOYED)
    _notify(session, adapter_id)
    return row.version


def undeploy(session: Session, project_id: str, adapter_id: str, version: int | None) -> list[int]:
    """Ask for a version, or all of them, to be served no longer. Returns the numbers that were deployed. Raises NotFound."""
    find_version(session, project_id, adapter_id, version)
    query = (
        select(AdapterVersion)
        .join(
            Deployment,
            (Deployment.adapter_id == AdapterVersion.adapter_id) & (Deployment.version == AdapterVersion.version),
        )
        .where(AdapterVersion.adapter_id == adapter_id, Deployment.desired == DEPLOYED)
    )
    if version is not None:
        query = query.where(AdapterVersion.version == version)
    rows = session.scalars(query.order_by(AdapterVersion.version)).all()
    for row in rows:
        _wish(session, row, UNDEPLOYED)
    _notify(session, adapter_id)
    return [row.version for row in rows]


def adapter_records(session: Session, adapters: Iterable[Adapter]) -> list[AdapterRecord]:
    """Adapters as the API answers them, each with its versions, newest first."""
    listed = list(adapters)
    ids = [adapter.id for adapter in listed]
    versions: dict[str, list[AdapterVersion]] = {}
    query = select(AdapterVersion).where(AdapterVersion.adapter_id.in_(ids)).order_by(AdapterVersion.version.desc())
    for row in session.scalars(query):
        versions.setdefault(row.adapter_id, []).append(row)
    deployed = select(Deployment.adapter_id, Deployment.version).where(
        Deployment.adapter_id.in_(ids), Deployment.desired == DEPLOYED
    )
    wanted = {(adapter_id, version) for adapter_id, version in session.execute(deployed)}
    receipts: dict[tuple[str, int], list[Receipt]] = {}
    for receipt in session.scalars(select(Receipt).where(Receipt.adapter_id.in_(ids)).order_by(Receipt.id.desc())):
        receipts.setdefault((receipt.adapter_id, receipt.version), []).append(receipt)
    alive = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, LIVE_SECONDS)
    boots = set(session.scalars(select(Endpoint.boot_id).where(Endpoint.last_seen_at > alive)))
    return [
        AdapterRecord(
            id=adapter.id,
            name=adapter.name,
            created_at=adapter.created_at,
            latest_version=max((row.version for row in versions.get(adapter.id, [])), default=0),
            versions=[
                _version_record(
                    row, (row.adapter_id, row.version) in wanted, receipts.get((row.adapter_id, row.version), []), boots
                )
                for row in versions.get(adapter.id, [])
            ],
        )
        for adapter in listed
    ]


def list_checkpoints(session: Session, job_id: str) -> list[CheckpointRecord]:
    """Checkpoints of a job whose files still stand, newest first."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    rows = session.scalars(query.order_by(Checkpoint.step.desc(), Checkpoint.attempt.desc()))
    return [
        CheckpointRecord(
            job_id=row.job_id,
            attempt=row.attempt,
            step=row.step,
            bytes=row.bytes,
            sha256=row.sha256,
            created_at=row.created_at,
        )
        for row in rows
    ]


def _wish(session: Session, version: AdapterVersion, desired: str) -> None:
    row = insert(Deployment).values(
        adapter_id=version.adapter_id, version=version.version, project_id=version.project_id, desired=desired
    )
    changes = {"desired": desired, "updated_at": func.now()}
    session.execute(row.on_conflict_do_update(index_elements=["adapter_id", "version"], set_=changes))


def _notify(session: Session, adapter_id: str) -> None:
    session.execute(text("SELECT pg_notify(:channel, :payload)"), {"channel": CHANNEL, "payload": adapter_id})


def _version_record(row: AdapterVersion, deployed: bool, receipts: list[Receipt], alive: set[str]) -> AdapterVersionRecord:
    facts = AdapterFacts.model_validate(row.facts)
    newest: dict[tuple[str, str], Receipt] = {}
    for receipt in receipts:  # newest first: a later check of the same kind replaces an earlier one
        newest.setdefault((receipt.endpoint_boot_id, receipt.check), receipt)
    passed = {r.endpoint_boot_id: r.endpoint_name for r in newest.values() if r.endpoint_boot_id in alive}
    for receipt in newest.values():
        if not receipt.passed:
            passed.pop(receipt.endpoint_boot_id, None)
    return AdapterVersionRecord(
        version=row.version,
        sha256=row.sha256,
        bytes=row.bytes,
        job_id=row.job_id,
        tuning=facts.tuning,
        base=facts.base,
        step=facts.step,
        eval_loss=facts.eval_loss,
        deployed=deployed,
        parity=facts.parity,
        servable_on=sorted(set(passed.values())),
        receipts=[
            ReceiptRecord(endpoint=r.endpoint_name, check=r.check, passed=r.passed, numbers=r.numbers, at=r.at)
            for r in receipts[:_RECEIPTS_SHOWN]
        ],
        created_at=row.created_at,
    )
