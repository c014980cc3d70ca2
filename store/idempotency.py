"""Idempotency-Key: a request that is sent twice has its effect once, and both get the same answer.

`find` and `keep` stand in the transaction of the effect itself: a second request with the key waits for the first one's
commit, then finds its answer. Only successes are kept, so a refused request may be mended and sent again under its key.
"""

import re
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from core.errors import InvalidInput, Problem
from store.tables import Idempotency

_KEY = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)


def find(session: Session, project_id: str, key: str, request_digest: str) -> tuple[int, dict[str, Any]] | None:
    """(status, body) answered before; None for a new key, which is then this transaction's until it ends.

    Raises InvalidInput when the key was used for another request, or can't be a key.
    """
    if not _KEY.fullmatch(key):
        problem = Problem("bad-idempotency-key", "must be 1 to 255 visible ASCII characters", field="Idempotency-Key")
        raise InvalidInput("The Idempotency-Key can't be used", [problem])
    lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
    session.execute(lock, {"name": f"idempotency:{project_id}:{key}"})
    row = session.scalar(select(Idempotency).where(Idempotency.project_id == project_id, Idempotency.key == key))
    if row is None:
        return None
    if row.request_digest != request_digest:
        problem = Problem("idempotency-key-reused", "the first request with this key had another body", field="Idempotency-Key")
        raise InvalidInput("The Idempotency-Key belongs to another request", [problem])
    return row.status, row.response


def keep(session: Session, project_id: str, key: str, request_digest: str, status: int, response: dict[str, Any]) -> None:
    """Store the answer with the effect."""
    session.add(Idempotency(project_id=project_id, key=key, request_digest=request_digest, status=status, response=response))
    session.flush()
