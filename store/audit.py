"""Who did what: one row per change, written in the transaction that makes it. The database refuses to alter or delete them."""

from typing import Any

from sqlalchemy.orm import Session

from store.tables import Audit


def record(session: Session, project_id: str, api_key_id: str | None, action: str, object_id: str, **detail: Any) -> None:
    """`action` is `<noun>.<verb>`; `api_key_id` is None for the operator. `detail` holds no secret and no row of data."""
    session.add(Audit(project_id=project_id, api_key_id=api_key_id, action=action, object_id=object_id, detail=detail))
    session.flush()
