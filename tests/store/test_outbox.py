"""Bells: due until answered, by the database's clock."""

from store import outbox
from store.db import Database
from store.outbox import RUN_JOB, Bell


def test_a_bell_is_due_at_once_then_after_its_time_and_never_once_answered(database: Database) -> None:
    bell = Bell(RUN_JOB, "job_aaaaaaaaaa")
    with database.transaction() as session:
        outbox.post(session, bell)
        assert outbox.due(session, 60) == [bell]
        outbox.mark_rung(session, [bell])
        assert outbox.due(session, 60) == []
        assert outbox.due(session, -1) == [bell]
        outbox.post(session, bell)
        assert outbox.due(session, 60) == [bell], "posted anew, it is due at once"
        outbox.answer(session, bell)
        assert outbox.due(session, -1) == []


def test_a_bell_posted_in_a_transaction_that_fails_never_was(database: Database) -> None:
    try:
        with database.transaction() as session:
            outbox.post(session, Bell(RUN_JOB, "job_aaaaaaaaaa"))
            raise KeyError
    except KeyError:
        pass
    with database.transaction() as session:
        assert outbox.due(session, -1) == []


def test_every_task_has_a_queue() -> None:
    assert {Bell(task, "x").queue for task in outbox.QUEUES} == {"gpu", "prepare"}
