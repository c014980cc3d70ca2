"""API keys: made once, looked up by id, compared by an HMAC that only the pepper's holder can make.

A token is `strop_sk_<id>_<secret>_<crc>`: the id finds the row, the secret (190 random bits) proves it, the checksum lets a
leak scanner tell a real key from a look-alike without asking us. Both HTTP services authenticate here. A slow password hash
would add nothing to a random secret and would let anyone burn our CPU.
"""

import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.errors import Forbidden, InvalidInput, NotFound, Problem, Unauthenticated
from store.tables import ApiKey

ADMIN = "admin"
SCOPES = (
    "datasets:read",
    "datasets:write",
    "jobs:read",
    "jobs:write",
    "adapters:read",
    "adapters:write",
    "models:read",
    "models:infer",
    "metrics:read",
    ADMIN,
)
"""What a key may do; `admin` is all of it."""

_TOKEN = re.compile(r"(strop_sk_([a-z0-9]{12})_([A-Za-z0-9]{32,64}))_([0-9a-f]{8})", re.ASCII)
_ID_LETTERS = string.ascii_lowercase + string.digits
_SECRET_LETTERS = string.ascii_letters + string.digits
_USED_EVERY = timedelta(minutes=1)


@dataclass(frozen=True)
class Caller:
    """Who asks, proven by a key."""

    project_id: str
    key_id: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """Raises Forbidden, naming the scope that is missing."""
        if scope not in self.scopes and ADMIN not in self.scopes:
            raise Forbidden(f"This key lacks the scope {scope}", [Problem("missing-scope", f"needs {scope}")])


def create_key(
    session: Session,
    pepper: bytes,
    project_id: str,
    *,
    name: str,
    scopes: list[str],
    lifetime: timedelta | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its token, which is nowhere else: who loses it makes a new one. Raises InvalidInput."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        problems = [Problem("unknown-scope", f"{scope!r} is no scope") for scope in unknown]
        raise InvalidInput(f"A key needs scopes out of: {', '.join(SCOPES)}", problems)
    number = "".join(secrets.choice(_ID_LETTERS) for _ in range(12))
    body = f"strop_sk_{number}_" + "".join(secrets.choice(_SECRET_LETTERS) for _ in range(32))
    key = ApiKey(id=f"key_{number}", project_id=project_id, name=name, hash=_hash(pepper, body), scopes=sorted(set(scopes)))
    session.add(key)
    session.flush()
    if lifetime is not None:
        now = session.scalar(select(func.now()))
        assert now is not None
        key.expires_at = now + lifetime
        session.flush()
    session.refresh(key)
    return key, f"{body}_{_checksum(body)}"


def authenticate(session: Session, pepper: bytes, token: str) -> Caller:
    """The caller a token belongs to; reads only. Raises Unauthenticated, the same for every reason, after the same work."""
    match = _TOKEN.fullmatch(token)
    body, number = (match[1], match[2]) if match and _checksum(match[1]) == match[4] else ("", "")
    row = session.execute(
        select(
            ApiKey.id,
            ApiKey.project_id,
            ApiKey.scopes,
            ApiKey.hash,
            (ApiKey.revoked_at.is_(None) & (ApiKey.expires_at.is_(None) | (ApiKey.expires_at > func.now()))).label("alive"),
        ).where(ApiKey.id == f"key_{number}")
    ).one_or_none()
    # An unknown id is compared too, with a hash nothing has, so that time does not tell which ids exist.
    is_equal = hmac.compare_digest(_hash(pepper, body), row.hash if row is not None else "0" * 64)
    if row is None or not is_equal or not row.alive:
        raise Unauthenticated("The API key is unknown, revoked or expired")
    return Caller(row.project_id, row.id, frozenset(row.scopes))


def note_use(session: Session, key_id: str) -> None:
    """Keep `last_used_at` right to the minute, without a write per request."""
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.last_used_at.is_(None) | (ApiKey.last_used_at < func.now() - _USED_EVERY))
        .values(last_used_at=func.now())
    )


def revoke_key(session: Session, key_id: str) -> datetime:
    """End a key now; again is no error. Raises NotFound."""
    revoked = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
        .returning(ApiKey.revoked_at)
    ).scalar_one_or_none()
    if revoked is None:
        raise NotFound(f"There is no key {key_id}")
    return revoked


def list_keys(session: Session, project_id: str) -> list[ApiKey]:
    """All keys of a project, oldest first."""
    return list(session.scalars(select(ApiKey).where(ApiKey.project_id == project_id).order_by(ApiKey.created_at, ApiKey.id)))


def _hash(pepper: bytes, body: str) -> str:
    return hmac.new(pepper, body.encode(), "sha256").hexdigest()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
