"""The supervisor without services: order, environment, one stack per home, and what it says when it can't."""

import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from standalone.process import StackError
from standalone.stack import Stack


def test_a_bare_stack_migrates_makes_the_first_key_and_keeps_both(home: Path) -> None:
    keys = []
    for _ in range(2):
        with Stack(home / "strop", services=()) as stack:
            engine = create_engine(stack.database_url)
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT count(*) FROM api_key")) == 1
            engine.dispose()
            keys.append(stack.api_key)
            assert stat.S_IMODE(stack.api_key_file.stat().st_mode) == 0o600
            assert stat.S_IMODE((stack.home / "pepper").stat().st_mode) == 0o600
            for log in stack.logs.iterdir():
                assert stack.api_key not in log.read_text()
    assert keys[0] == keys[1]


def test_only_one_stack_stands_on_a_home(home: Path) -> None:
    with Stack(home / "strop", services=()) as stack:
        with pytest.raises(StackError, match="another stack runs in"):
            Stack(home / "strop", services=()).start()
        with pytest.raises(StackError, match="another stack runs in"):
            Stack(home / "strop", services=()).wipe()
        stack.check_alive()


def test_a_wiped_home_is_gone_and_a_new_one_starts(home: Path) -> None:
    stack = Stack(home / "strop", services=())
    stack.wipe()  # nothing there: nothing to do
    with stack:
        first = stack.api_key
    stack.wipe()
    assert not stack.home.exists()
    with stack:
        assert stack.api_key != first


def test_a_database_that_was_killed_is_found_and_started_again_with_its_data(home: Path) -> None:
    with Stack(home / "strop", services=()) as stack:
        for name in ("postgres", "redis"):
            stack.kill(name)
            with pytest.raises(StackError, match=f"{name} ended with exit code -9"):
                stack.check_alive()
            stack.restart(name)
        engine = create_engine(stack.database_url)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM api_key")) == 1
        engine.dispose()


def test_processes_get_what_they_need_and_no_other_secret(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    monkeypatch.setenv("STROP_LEASE_SECONDS", "7")
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere/")
    stack = Stack(home / "strop", services=(), settings={"STROP_POLL_SECONDS": "1"}, redis_url="redis://there")
    environment = stack.environment
    assert "SOME_TOKEN" not in environment
    assert (environment["STROP_LEASE_SECONDS"], environment["STROP_POLL_SECONDS"]) == ("7", "1")
    assert environment["DATABASE_URL"] == stack.database_url
    assert environment["REDIS_URL"] == "redis://there"
    assert environment["PATH"] == os.environ["PATH"]


def test_a_failing_setup_command_shows_its_output_and_leaves_nothing_running(home: Path) -> None:
    stack = Stack(home / "strop", services=())
    (home / "strop" / "models" / "broken").mkdir(parents=True)
    (home / "strop" / "models" / "broken" / "config.json").write_text("{")
    with pytest.raises(StackError, match=r"(?s)store\.admin models scan` failed with code 1.*broken"):
        stack.start()
    assert stack.postgres is not None
    assert not stack.postgres.process.is_running
    with Stack(home / "strop", services=(), settings={"STROP_MODELS": str(home / "none")}):
        pass  # the lock was given back


def test_a_taken_port_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("standalone.stack._PORT_WAIT_SECONDS", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} is taken.*--api-port"):
            Stack(home / "strop", api_port=port).start()


def test_a_service_that_does_not_exist_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="unknown services: gpu; there are api, preparer, serving, worker"):
        Stack(home, services=("gpu",))
