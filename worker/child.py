"""One child process: its start, its log, its end. Knows nothing of what the child does or says.

A child is a fresh interpreter in a session of its own, with an environment made from an allow-list (no secret of the service
is in it). It dies with the process that started it: by the kernel's parent-death signal, and by end-of-file on its stdin.
Start it from a thread that lives as long as the child should: the kernel means the thread.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import core
from store import bound

LOG_LIMIT_BYTES = 8 << 20
"""What a log holds of the child's output; the rest is read and dropped, so that the child never blocks on it."""

_IMPORT_ROOT = Path(str(core.__file__)).resolve().parents[1]
_TAIL_BYTES = 8 << 10
_INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "TMPDIR",
    "TZ",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_CACHE_DIR",
    "XDG_CACHE_HOME",
    "CC",
)
_FIXED = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


class Child:
    """A running child. `command` gets stdin as its control line; stdout and stderr go to `log`."""

    def __init__(self, command: Sequence[str], *, log: Path, pass_fds: Sequence[int] = ()) -> None:
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", bound.__file__, signal.SIGKILL.name, str(os.getpid()), "-", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=inherited | _FIXED,
            cwd=_IMPORT_ROOT,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._tail = b""
        self._log = threading.Thread(target=self._keep_log, args=(log,), name="child-log", daemon=True)
        self._log.start()

    def has_exited(self) -> bool:
        """The process ended. It stays a zombie until `reap`, so its process group can't be someone else's meanwhile."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def ask_to_stop(self) -> None:
        """The line `stop`: write a checkpoint and end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"stop\n")

    def terminate(self) -> None:
        """SIGTERM to the whole group."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        self._signal(signal.SIGKILL)

    def reap(self) -> int:
        """End the group, wait for the process and the rest of its output. Returns the exit code, -n for signal n."""
        self.kill()
        code = self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._log.join(timeout=5)  # a process that left the group may hold the pipe open
        if not self._log.is_alive():
            self._process.stdout.close()
        return code

    def tail(self) -> str:
        """The last of what it printed."""
        return self._tail.decode(errors="replace").replace("\0", "�")

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _keep_log(self, path: Path) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        left = LOG_LIMIT_BYTES
        with path.open("ab", buffering=0) as log:
            while chunk := os.read(descriptor, 1 << 16):
                self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
                if left > 0:
                    _write(log.fileno(), chunk[:left])
                    left -= len(chunk)
                    if left <= 0:
                        _write(log.fileno(), f"\n[truncated: a log holds {LOG_LIMIT_BYTES >> 20} MiB]\n".encode())


def _write(descriptor: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk costs the log, not the run
        while data:
            data = data[os.write(descriptor, data) :]
