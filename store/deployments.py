"""What an inference endpoint reads and writes: the versions to serve, the receipts of its checks, and that it is alive.

Deploying is a control-plane act and not done here but in `store/adapters.py`, which also names the channel that endpoints
listen on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from core.adapter import BaseIdentity
from store.adapters import DEPLOYED
from store.tables import Adapter, AdapterVersion, Deployment, Endpoint, Model, Receipt


@dataclass(frozen=True)
class DesiredVersion:
    """A version that should be served. A later `wanted_at` asks for another try at one that failed its checks."""

    project_id: str
    adapter_id: str
    name: str
    version: int
    sha256: str
    wanted_at: datetime

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Check:
    """One check before serving, with the numbers it saw."""

    name: str
    passed: bool
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RegisteredModel:
    """Where a base model lies and who it is."""

    name: str
    folder: str
    weights: str
    allow_remote_code: bool
    config: dict[str, Any]


def desired_versions(session: Session) -> list[DesiredVersion]:
    """Every deployed version of every project, oldest wish first."""
    rows = session.execute(
        select(
            Deployment.project_id,
            Deployment.adapter_id,
            Adapter.name,
            Deployment.version,
            AdapterVersion.sha256,
            Deployment.updated_at,
        )
        .join(Adapter, Adapter.id == Deployment.adapter_id)
        .join(
            AdapterVersion,
            (AdapterVersion.adapter_id == Deployment.adapter_id) & (AdapterVersion.version == Deployment.version),
        )
        .where(Deployment.desired == DEPLOYED)
        .order_by(Deployment.updated_at, Deployment.adapter_id, Deployment.version)
    )
    return [DesiredVersion(*row) for row in rows]


def insert_receipts(
    session: Session, version: DesiredVersion, checks: Sequence[Check], *, boot_id: str, endpoint_name: str
) -> None:
    """Record the checks one endpoint made on a version, passed and failed."""
    if not checks:
        return
    session.execute(
        insert(Receipt),
        [
            {
                "project_id": version.project_id,
                "adapter_id": version.adapter_id,
                "version": version.version,
                "endpoint_boot_id": boot_id,
                "endpoint_name": endpoint_name,
                "check": check.name,
                "passed": check.passed,
                "numbers": check.numbers,
            }
            for check in checks
        ],
    )


def beat(session: Session, *, boot_id: str, name: str, bases: Sequence[BaseIdentity], device: str) -> None:
    """Say that the endpoint is alive and what it serves."""
    facts = {"name": name, "bases": [base.model_dump() for base in bases], "device": device}
    row = upsert(Endpoint).values(boot_id=boot_id, **facts)
    session.execute(row.on_conflict_do_update(index_elements=["boot_id"], set_={**facts, "last_seen_at": func.now()}))


def find_models(session: Session, names: Sequence[str]) -> tuple[dict[str, RegisteredModel], list[str]]:
    """(registered models by name among `names`, all registered names): the second is for the sentence about a missing one."""
    columns = (Model.name, Model.folder, Model.weights, Model.allow_remote_code, Model.config)
    rows = session.execute(select(*columns).order_by(Model.name)).all()
    return {row.name: RegisteredModel(*row) for row in rows if row.name in names}, [row.name for row in rows]
