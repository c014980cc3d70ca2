"""The database: one engine, one transaction() whose `with` block is the transaction.

Functions elsewhere in `store/` take a Session first and never commit. What must come after the commit stands below the
block. Nothing slow (network, file, child) happens inside one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session

from store.settings import Settings

UNREACHABLE = (OperationalError, InterfaceError, TimeoutError)
"""What a transaction raises when the database is away, restarting or overrun: worth another try. All else is a bug."""

_NETWORK = {  # libpq: a silent partition is noticed after seconds, not after the kernel's quarter of an hour
    "connect_timeout": 5,
    "tcp_user_timeout": 15_000,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}


def database_url(settings: Settings) -> URL:
    """The URL with its password filled in from the password file. Raises ValueError when none is set."""
    if not settings.database_url:
        raise ValueError("DATABASE_URL is not set")
    url = make_url(settings.database_url).set(drivername="postgresql+psycopg")
    if settings.database_password_file is not None:
        url = url.set(password=settings.database_password_file.read_text().strip())
    return url


class Database:
    """A pool of connections. Make one per process, after any fork."""

    def __init__(self, url: URL | str, *, pool_size: int = 5, application_name: str = "strop") -> None:
        self.engine: Engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=True,
            pool_timeout=10,
            connect_args={**_NETWORK, "application_name": application_name},
        )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end of the block, rolled back on an exception."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()
