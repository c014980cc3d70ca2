"""Child processes: their end, their log, and what dies with whom."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from standalone.process import Process, StackError, free_port, last_lines, port_is_free

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]


def process(folder: Path, command: list[str], **options: object) -> Process:
    environment = {"PATH": os.environ["PATH"]}
    return Process("probe", command, log=folder / "probe.log", environment=environment, folder=folder, **options)  # type: ignore[arg-type]


def test_a_process_gets_its_environment_and_nothing_else(tmp_path: Path) -> None:
    probe = process(
        tmp_path, [sys.executable, "-c", "import os, sys; print(sorted(os.environ), sys.stdin.read())"], stdin=b"word"
    )
    probe.start()
    _until_ended(probe)
    assert probe.log.read_text().split() == ["['LC_CTYPE',", "'PATH']", "word"]


def test_a_process_that_ended_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    probe = process(tmp_path, [sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    probe.start()
    _until_ended(probe)
    with pytest.raises(StackError, match=r"(?s)probe ended with exit code 3.*probe\.log.*why"):
        probe.check_alive()


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    probe = process(tmp_path, [sys.executable, "-c", stubborn], stop_seconds=0.2)
    probe.start()
    while "deaf" not in probe.log.read_text():
        probe.check_alive()
        time.sleep(0.02)
    probe.stop()
    assert probe.exit_code == -signal.SIGKILL


def test_a_process_dies_with_a_killed_owner(tmp_path: Path) -> None:
    owner_code = f"""
import os, time
from pathlib import Path
from standalone.process import Process
probe = Process("probe", {SLEEP!r}, log=Path("probe.log"), environment=dict(os.environ), folder=Path.cwd())
probe.start()
print(probe.pid, flush=True)
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    owner = subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert owner.stdout is not None
    with owner.stdout as output:
        pid = int(output.readline())
    os.kill(pid, 0)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_taken_port_is_seen() -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not port_is_free(listener.getsockname()[1])
    assert port_is_free(free_port())


def test_the_end_of_a_log_is_twenty_lines(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    lines = last_lines(log).splitlines()
    assert (len(lines), lines[1], lines[-1]) == (21, "  line 80", "  line 99")
    assert "(empty)" in last_lines(tmp_path / "none.log")


def _until_ended(probe: Process) -> None:
    deadline = time.monotonic() + 20
    while probe.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.02)
