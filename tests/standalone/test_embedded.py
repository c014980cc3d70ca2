"""The embedded servers: real PostgreSQL and Redis, side by side, and after their owner was killed."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import redis

from standalone.postgres import EmbeddedPostgres
from standalone.process import StackError
from standalone.redis import EmbeddedRedis

ROOT = Path(__file__).resolve().parents[2]

OWNER = """
import sys, time
from pathlib import Path
from standalone.postgres import EmbeddedPostgres
from standalone.redis import EmbeddedRedis
home = Path(sys.argv[1])
postgres = EmbeddedPostgres(home / "postgres"); postgres.start()
store = EmbeddedRedis(home / "redis", home / "redis.password"); store.start()
print(postgres.process.pid, store.process.pid, flush=True)
time.sleep(600)
"""


def query(postgres: EmbeddedPostgres, sql: str) -> list[tuple[object, ...]]:
    with psycopg.connect(postgres.url.replace("+psycopg", "")) as connection:
        cursor = connection.execute(sql)
        return list(cursor.fetchall()) if cursor.description else []


def client(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url, password=server.password_file.read_text())


def test_postgres_keeps_its_data_between_starts(home: Path) -> None:
    with EmbeddedPostgres(home / "postgres") as postgres:
        query(postgres, "CREATE TABLE kept AS SELECT 7 AS n")
    with EmbeddedPostgres(home / "postgres") as postgres:
        assert query(postgres, "SELECT n FROM kept") == [(7,)]
        assert query(postgres, "SHOW server_encoding") == [("UTF8",)]
        assert int(str(query(postgres, "SHOW server_version_num")[0][0])) >= 150000


def test_postgres_listens_on_no_port_and_lets_no_other_user_in(home: Path) -> None:
    with EmbeddedPostgres(home / "postgres") as postgres:
        assert query(postgres, "SHOW listen_addresses") == [("",)]
        assert stat.S_IMODE((postgres.data).stat().st_mode) == 0o700


def test_a_home_too_deep_for_a_socket_still_works(home: Path) -> None:
    deep = home / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with EmbeddedPostgres(deep / "postgres") as postgres:
        assert query(postgres, "SELECT 1") == [(1,)]
        socket_folder = Path(str(query(postgres, "SHOW unix_socket_directories")[0][0]))
        assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
    assert not socket_folder.exists()


def test_a_cluster_that_was_cut_short_is_made_again(home: Path) -> None:
    (home / "postgres" / "data.new" / "base").mkdir(parents=True)
    with EmbeddedPostgres(home / "postgres") as postgres:
        assert query(postgres, "SELECT 1") == [(1,)]


def test_redis_needs_its_password_and_keeps_it_in_a_private_file(home: Path) -> None:
    with EmbeddedRedis(home / "redis", home / "redis.password") as server:
        assert stat.S_IMODE(server.password_file.stat().st_mode) == 0o600
        with pytest.raises(redis.AuthenticationError), redis.Redis.from_url(server.url) as stranger:
            stranger.ping()
        password = server.password_file.read_text()
        assert password not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
        with client(server) as friend:
            assert friend.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert friend.config_get("bind") == {"bind": "127.0.0.1"}


def test_redis_keeps_its_data_between_starts(home: Path) -> None:
    for expected in (None, b"1"):
        with EmbeddedRedis(home / "redis", home / "redis.password") as server, client(server) as store:
            assert store.get("bell") == expected
            store.set("bell", 1)


def test_two_homes_stand_side_by_side(home: Path) -> None:
    one, two = home / "one", home / "two"
    with (
        EmbeddedPostgres(one / "postgres") as first,
        EmbeddedPostgres(two / "postgres") as second,
        EmbeddedRedis(one / "redis", one / "redis.password") as left,
        EmbeddedRedis(two / "redis", two / "redis.password") as right,
    ):
        query(first, "CREATE TABLE mine AS SELECT 1")
        assert query(second, "SELECT to_regclass('mine')") == [(None,)]
        with client(left) as mine, client(right) as other:
            mine.set("key", 1)
            assert other.get("key") is None
        assert left.url != right.url


def test_servers_end_with_a_killed_owner_and_the_next_owner_finds_the_data(home: Path) -> None:
    owner, pids = _start_owner(home)
    with psycopg.connect(host=str(home / "postgres" / "data"), user="postgres", dbname="postgres") as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
    owner.kill()
    owner.wait()
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    with EmbeddedPostgres(home / "postgres") as postgres, EmbeddedRedis(home / "redis", home / "redis.password") as server:
        assert query(postgres, "SELECT n FROM kept") == [(7,)]
        with client(server) as store:
            assert store.ping()


def test_a_start_right_after_the_kill_waits_for_the_old_servers(home: Path) -> None:
    owner, (postgres_pid, redis_pid) = _start_owner(home)
    # Stopped processes do not answer the death signal of their owner, so both are certainly still there.
    for pid in (postgres_pid, redis_pid):
        os.kill(pid, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    for pid in (postgres_pid, redis_pid):
        os.kill(pid, signal.SIGCONT)
    with EmbeddedPostgres(home / "postgres") as postgres, EmbeddedRedis(home / "redis", home / "redis.password") as server:
        assert query(postgres, "SELECT 1") == [(1,)]
        with client(server) as store:
            assert store.ping()
        assert postgres.process.pid != postgres_pid


def test_a_stale_pid_file_that_names_a_stranger_is_not_followed(home: Path) -> None:
    with EmbeddedPostgres(home / "postgres") as postgres:
        data = postgres.data
    # Of the same user as the server: PostgreSQL takes such a process for its predecessor.
    bystander = subprocess.Popen(["sleep", "600"], user=data.owner())
    try:
        (data / "postmaster.pid").write_text(f"{bystander.pid}\n{data}\n1700000000\n5432\n{data}\n\n 1 1\nready\n")
        (home / "redis").mkdir()
        (home / "redis" / "redis.pid").write_text(str(bystander.pid))
        with EmbeddedRedis(home / "redis", home / "redis.password") as server, client(server) as store:
            assert store.ping()
        with EmbeddedPostgres(home / "postgres") as postgres:
            assert query(postgres, "SELECT 1") == [(1,)]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(home: Path) -> None:
    with EmbeddedPostgres(home / "postgres") as postgres:
        data = postgres.data
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(StackError, match=r"(?s)postgres ended with exit code 1.*initialized by PostgreSQL version 9"):
        EmbeddedPostgres(home / "postgres").start()


def _start_owner(home: Path) -> tuple[subprocess.Popen[str], tuple[int, int]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE, text=True, cwd=home, env=environment
    )
    assert owner.stdout is not None
    with owner.stdout as output:
        postgres_pid, redis_pid = map(int, output.readline().split())
    return owner, (postgres_pid, redis_pid)


def _until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
