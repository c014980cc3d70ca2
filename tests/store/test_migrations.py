"""The migrations and the tables say the same, both ways; and the database keeps its own two rules."""

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from store.db import Database
from store.tables import DEFAULT_PROJECT, Audit, Job
from tests.conftest import ROOT


def test_migrations_equal_the_tables_and_run_both_ways(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        config = Config(ROOT / "alembic.ini")
        config.attributes["connection"] = connection
        command.check(config)
        command.downgrade(config, "base")
        assert connection.scalar(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")) == 1  # alembic's own
        command.upgrade(config, "head")
        command.check(config)
    engine.dispose()


def test_an_ended_job_never_changes_its_status(database: Database) -> None:
    with database.transaction() as session:
        session.add(Job(id="job_x", project_id=DEFAULT_PROJECT, spec={}, base_model="m", status="succeeded", message=""))
    with pytest.raises(DBAPIError, match="the job has ended"), database.transaction() as session:
        session.execute(text("UPDATE job SET status = 'queued'"))
    with database.transaction() as session:
        session.execute(text("UPDATE job SET message = 'still editable'"))


def test_the_audit_is_append_only(database: Database) -> None:
    with database.transaction() as session:
        session.add(Audit(project_id=DEFAULT_PROJECT, action="test", object_id="x", detail={}))
    for statement in ("UPDATE audit SET action = 'other'", "DELETE FROM audit"):
        with pytest.raises(DBAPIError, match="append-only"), database.transaction() as session:
            session.execute(text(statement))
