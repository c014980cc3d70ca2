"""The database's schema as the migrations define it: bring it up to date, and say whether it is."""

import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from store.db import database_url
from store.settings import Settings

_MIGRATIONS = Path(__file__).resolve().parents[1] / "migrations"
_LOCK = 0x5354524F50  # "STROP": two hosts that start together migrate one after the other


def upgrade(settings: Settings, *, patience_seconds: float = 30.0) -> None:
    """Apply all migrations. A database that does not answer yet is waited for; then OperationalError."""
    engine = create_engine(database_url(settings), connect_args={"connect_timeout": 5, "application_name": "strop-migrate"})
    deadline = time.monotonic() + patience_seconds
    try:
        while True:
            try:
                engine.connect().close()
                break
            except OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def newest_revision() -> str | None:
    """The migration this code was written for."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def current_revision(session: Session) -> str | None:
    """The migration the database stands at; None for an empty one."""
    if session.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision: str | None = session.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
