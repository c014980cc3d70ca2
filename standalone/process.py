"""One process of the stack: its command, its log, its end. Knows nothing of what the process does.

Every process is a session of its own (a Ctrl-C reaches only the supervisor, which stops the rest in order), writes to one
log file, and is sent a signal by the kernel when the supervisor dies, however it dies (store/bound.py).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from store import bound

_LAST_LINES = 20
_KILL_SECONDS = 10.0


class StackError(Exception):
    """The stack can't start or go on; the message says what to check, with the end of the log concerned."""


class Process:
    """A child process that can be started again with the same command."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        folder: Path,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_seconds: float = 30.0,
        stdin: bytes = b"",
    ) -> None:
        """`user` is the system user to drop to; `stdin` is what the process reads there, so that secrets stay off argv."""
        self.name = name
        self.command = list(command)
        self.log = log
        self.environment = dict(environment)
        self.folder = folder
        self.user = user
        self.stop_signal = stop_signal
        self.stop_seconds = stop_seconds
        self.stdin = stdin
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise StackError(f"{self.name} was not started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or was never started."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        wrapper = [sys.executable, "-I", "-S", bound.__file__, self.stop_signal.name, str(os.getpid()), self.user or "-"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*wrapper, *self.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        # A process that ended at once has closed its end already: whoever waits for it sees that, with its log.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self.stdin)

    def ask_to_stop(self) -> None:
        """Send the stop signal to the process itself; it tells its own children."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(self.stop_signal)

    def stop(self) -> None:
        """Ask, wait `stop_seconds`, then kill the whole group."""
        self.ask_to_stop()
        if self._process is not None:
            try:
                self._process.wait(self.stop_seconds)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """SIGKILL to the process group, and wait until the process is gone."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_KILL_SECONDS)

    def check_alive(self) -> None:
        """Raises StackError with the end of the log when the process has ended."""
        if not self.is_running:
            raise StackError(f"{self.name} ended with exit code {self.exit_code}.\n{last_lines(self.log)}")


def last_lines(log: Path, count: int = _LAST_LINES) -> str:
    """The end of a log file, headed by its path, for people."""
    lines = log.read_text(errors="replace").splitlines()[-count:] if log.exists() else []
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in lines or ["(empty)"])])


def free_port() -> int:
    """A TCP port of the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def end_leftover(pid_file: Path, program: str, folder: Path, stop_signal: signal.Signals, seconds: float = 20.0) -> None:
    """End the process a pid file names, if it is still the one meant: it runs `program` and works in `folder`.

    A supervisor that was killed leaves its databases to end by themselves; the next one waits for that here, so that two
    servers never stand on one folder. Raises StackError when the process does not end in time.
    """
    try:
        pid = int(pid_file.read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return
    deadline = time.monotonic() + seconds
    if _is_meant(pid, program, folder):
        os.kill(pid, stop_signal)
    while _is_meant(pid, program, folder):
        if time.monotonic() > deadline:
            raise StackError(f"process {pid} of an earlier stack (named in {pid_file}) does not end: stop it by hand")
        time.sleep(0.05)


def _is_meant(pid: int, program: str, folder: Path) -> bool:
    proc = Path(f"/proc/{pid}")
    try:
        return program in (proc / "cmdline").read_text(errors="replace") and (proc / "cwd").readlink() == folder.resolve()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or another user's
        return False
