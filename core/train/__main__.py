"""The training child: `python -m core.train RUN_DIR --events-fd N`.

Reads run.json, drives the loop, writes every event as one numbered JSON line to its own pipe and ends with the exit code of
its reason. stdout and stderr are free for libraries; the supervisor keeps them as the run's log. Control is stdin: the line
`stop` asks for a checkpoint and an end; end-of-file means that the supervisor is gone, and then so is the child, even in the
middle of loading. On Linux the kernel kills it too when its parent dies.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the child and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m core.train")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--events-fd", type=int, required=True)
    arguments = parser.parse_args()
    _die_with_parent()
    stop = threading.Event()
    threading.Thread(target=_obey_stdin, args=(stop,), daemon=True, name="control").start()
    _set_up_libraries()
    return _run(arguments.run_dir, _EventPipe(arguments.events_fd), stop)


class _EventPipe:
    """Numbers events 1, 2, ... and writes each as a line, unbuffered."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._seq = 0

    def write(self, event: Any) -> None:
        self._seq += 1
        line = event.model_copy(update={"seq": self._seq}).model_dump_json().encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]


def _run(run_dir: Path, pipe: _EventPipe, stop: threading.Event) -> int:
    # Heavy imports come after the child has tied its life to its parent's.
    from core.errors import RunError, StropError
    from core.events import Ended
    from core.run import read_run_input
    from core.states import Reason
    from core.train.loop import train

    step = 0
    try:
        ended = None
        for event in train(read_run_input(run_dir), run_dir, stop.is_set):
            step = getattr(event, "step", step)
            pipe.write(event)
            if isinstance(event, Ended):
                ended = event
        if ended is None:
            raise RuntimeError("the loop ended without saying why")
    except BrokenPipeError:
        raise  # nobody is left to tell
    except Exception as error:
        traceback.print_exc()
        reason = error.reason if isinstance(error, RunError) else Reason.INTERNAL_ERROR
        message = str(error) if isinstance(error, StropError) else f"{type(error).__name__}: {error}"
        ended = Ended(reason=reason, message=message, step=step)
        pipe.write(ended)
    code = ended.reason.facts.exit_code
    return 1 if code is None else code


def _die_with_parent() -> None:
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)


def _obey_stdin(stop: threading.Event) -> None:
    # Raw reads: a daemon thread inside sys.stdin's lock would crash the interpreter's shutdown.
    pending = b""
    while chunk := os.read(0, 4096):
        *lines, pending = (pending + chunk).split(b"\n")
        if b"stop" in (line.strip() for line in lines):
            stop.set()
    os._exit(1)


def _set_up_libraries() -> None:
    # Read by native code as it is loaded, so it is set before torch is imported. A waiting OpenMP thread that spins takes
    # the core another one needs: on two busy cores training was measured at 13 tokens/s so, and at 93 without.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Steps of differing size fill the GPU's memory with holes that fit nothing; and what is recorded for one size (core.train.
    # fused.graphs) is used again for the next.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
    )


def _leave(code: int) -> NoReturn:
    """End at once: all is written and told, and the result waits for this process to be gone.

    To take the interpreter and its libraries down in order takes seconds. What they may have started beside is of this process's
    group, which the supervisor ends.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what native code printed
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
