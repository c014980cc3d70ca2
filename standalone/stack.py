"""The whole service on one machine: every process started in order, watched, and stopped in reverse.

    with Stack(home) as stack:
        httpx.get(f"{stack.api_url}/jobs", headers=stack.headers)

Order: PostgreSQL, Redis, migrations, first key, models, then control plane, preparer, inference endpoint, training worker.
Stops the training worker first, which drains: its run writes a checkpoint and goes back into the queue. Two stacks stand
side by side as long as their homes and ports differ. Start one from a thread that lives as long as the stack: every
process ends with the thread that started it.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

from standalone.gpu import serving_share_gib
from standalone.postgres import EmbeddedPostgres
from standalone.process import Process, StackError, free_port, last_lines, port_is_free
from standalone.redis import EmbeddedRedis

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("api", "preparer", "serving", "worker")
"""Started in this order, stopped in the reverse one. `worker` is the training worker (queue `gpu`)."""

_PASSED_ON = (
    *("CUDA_VISIBLE_DEVICES", "HF_HOME", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "NVIDIA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "PATH", "PYTHONDONTWRITEBYTECODE", "SSL_CERT_FILE", "STORAGE_URL", "TMPDIR", "TZ"),
)
_PASSED_ON_PREFIXES = ("STROP_", "AWS_")
_DEATHS_ALLOWED = 3
_DEATHS_WINDOW_SECONDS = 60.0
_PORT_WAIT_SECONDS = 10.0
_SETUP_SECONDS = 300.0
_WORKER_STOP_MARGIN_SECONDS = 30.0


class Stack:
    """Every process of the service, as children of this one."""

    def __init__(
        self,
        home: Path,
        *,
        services: Collection[str] = SERVICES,
        settings: Mapping[str, str] | None = None,
        api_port: int | None = None,
        serving_port: int | None = None,
        database_url: str | None = None,
        redis_url: str | None = None,
        folder: Path | None = None,
        ready_seconds: float = 180.0,
        gpu_workers: int = 1,
    ) -> None:
        """`settings` are environment variables that win over inherited ones. A port that is None is a free one.

        With `database_url` or `redis_url` that server is used and none embedded. `folder` is the working folder of every
        process, where a `.env` file is read; by default the home, which has none.
        """
        if unknown := set(services) - set(SERVICES):
            raise ValueError(f"unknown services: {', '.join(sorted(unknown))}; there are {', '.join(SERVICES)}")
        self.home = home.absolute()
        self.services = [name for name in SERVICES if name in services]
        self.logs = self.home / "logs"
        self.folder = (folder or self.home).absolute()
        self.ready_seconds = ready_seconds
        self.gpu_workers = gpu_workers
        self.processes: dict[str, Process] = {}
        self.postgres = None if database_url else EmbeddedPostgres(self.home / "postgres", log=self.logs / "postgres.log")
        self.redis = (
            None if redis_url else EmbeddedRedis(self.home / "redis", self.home / "redis.password", log=self.logs / "redis.log")
        )
        self._settings = dict(settings or {})
        self._database_url = database_url
        self._redis_url = redis_url
        self._ports = {"api": api_port, "serving": serving_port}
        self._lock: IO[str] | None = None

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['api']}"

    @property
    def serving_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['serving']}"

    @property
    def database_url(self) -> str:
        return self.postgres.url if self.postgres else self._database_url or ""

    @property
    def redis_url(self) -> str:
        return self.redis.url if self.redis else self._redis_url or ""

    @property
    def api_key_file(self) -> Path:
        return self.home / "api_key"

    @property
    def api_key(self) -> str:
        return self.api_key_file.read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    @property
    def environment(self) -> dict[str, str]:
        """What every process of ours gets. Values of the caller win over the inherited ones."""
        inherited = {
            name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
        }
        ours = {"STROP_HOME": str(self.home), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        # Training, serving and the databases share the cores: threads that spin while they wait for one another would take
        # them from each other (13 tokens/s against 93, measured on two loaded cores).
        ours["OMP_WAIT_POLICY"] = "PASSIVE"
        if "STROP_SERVING_GPU_GIB" not in inherited and (share := serving_share_gib()) is not None:
            ours["STROP_SERVING_GPU_GIB"] = f"{share:.2f}"
        environment = inherited | ours | self._settings | {"DATABASE_URL": self.database_url, "REDIS_URL": self.redis_url}
        if self.redis is not None:
            environment["STROP_REDIS_PASSWORD_FILE"] = str(self.redis.password_file)
        return environment

    def wipe(self) -> None:
        """Delete the home with everything in it. Raises StackError while a stack runs there."""
        if not self.home.exists():
            return
        self._take_lock()
        for server in (self.postgres, self.redis):
            if server is not None:
                server.end_leftover()
        shutil.rmtree(self.home)
        self._release_lock()

    def start(self) -> None:
        """Returns when every service answers. Raises StackError, after stopping what had started, when one can't."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.logs.mkdir(exist_ok=True)
        self._take_lock()
        try:
            self._choose_ports()
            for log in self.logs.glob("*.log"):
                log.replace(log.with_suffix(".log.1"))
            if self.postgres is not None:
                self.postgres.start()
            if self.redis is not None:
                self.redis.start()
            for command in (["migrate"], ["init"], ["models", "scan"]):
                self.run_setup("-m", "store.admin", *command)
            for name in self.services:
                self._start_service(name)
            for _ in range(1, self.gpu_workers if "worker" in self.services else 1):
                self.start_extra_worker()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop everything in reverse order. The worker drains first. Data stays in the home."""
        drained = [name for name in self.processes if name.startswith("worker")]
        for name in drained:
            self.processes[name].ask_to_stop()
        for name in drained + [name for name in reversed(self.processes) if name not in drained]:
            self.processes[name].stop()
        if self.redis is not None:
            self.redis.stop()
        if self.postgres is not None:
            self.postgres.stop()
        self._release_lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def restart(self, name: str) -> None:
        """Stop one process as an operator would, start it again and wait until the services answer."""
        self._any(name).stop()
        self._start_again(name)
        self.wait_until_ready()

    def kill(self, name: str) -> None:
        """SIGKILL one process and its group, as the kernel does when memory runs out. It stays down until `restart`."""
        self._any(name).kill()

    def start_extra_worker(self) -> str:
        """One more training worker; answers its name."""
        name = next(f"worker{n}" for n in range(2, 1000) if f"worker{n}" not in self.processes)
        self._start_service(name)
        return name

    def run_setup(self, *arguments: str) -> None:
        """Run `python ARGUMENTS` with the stack's environment to its end; its output goes to logs/setup.log."""
        log = self.logs / "setup.log"
        with log.open("ab") as output:
            try:
                done = subprocess.run(
                    [sys.executable, *arguments],
                    env=self.environment,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_SETUP_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise StackError(f"`{' '.join(arguments)}` took over {_SETUP_SECONDS:.0f} s.\n{last_lines(log)}") from None
        if done.returncode != 0:
            raise StackError(f"`python {' '.join(arguments)}` failed with code {done.returncode}.\n{last_lines(log)}")

    def wait_until_ready(self) -> None:
        """Returns when /readyz of both HTTP services answers 200 and every process lives."""
        deadline = time.monotonic() + self.ready_seconds
        for name, url in (("api", self.api_url), ("serving", self.serving_url)):
            if name not in self.processes:
                continue
            while (answer := _readiness(url)) is not None:
                self.check_alive()
                if time.monotonic() > deadline:
                    log = last_lines(self.processes[name].log)
                    raise StackError(f"{name} is not ready after {self.ready_seconds:.0f} s ({answer}).\n{log}")
                time.sleep(0.1)
        self.check_alive()

    def check_alive(self) -> None:
        """Raises StackError, with the end of its log, for a process that ended by itself."""
        for process in self._all().values():
            process.check_alive()

    def supervise(self, report: Callable[[str], None]) -> None:
        """Start again what ends by itself, for ever. Raises StackError for a process that ends too often."""
        deaths: dict[str, list[float]] = {}
        while True:
            for name, process in self._all().items():
                if process.is_running:
                    continue
                now = time.monotonic()
                deaths[name] = [*(at for at in deaths.get(name, []) if now - at < _DEATHS_WINDOW_SECONDS), now]
                if len(deaths[name]) > _DEATHS_ALLOWED:
                    process.check_alive()
                report(f"{name} ended with exit code {process.exit_code} and is started again; see {process.log}")
                self._start_again(name)
            time.sleep(0.5)

    def _all(self) -> dict[str, Process]:
        servers = {"postgres": self.postgres, "redis": self.redis}
        return {name: server.process for name, server in servers.items() if server is not None} | self.processes

    def _any(self, name: str) -> Process:
        processes = self._all()
        if name not in processes:
            raise ValueError(f"no process {name!r}; there are {', '.join(processes)}")
        return processes[name]

    def _start_again(self, name: str) -> None:
        if name == "postgres" and self.postgres is not None:
            self.postgres.start()
        elif name == "redis" and self.redis is not None:
            self.redis.start()
        else:
            self.processes[name].start()

    def _start_service(self, name: str) -> None:
        environment = self.environment
        stop_seconds = 15.0
        if name.startswith(("worker", "preparer")):
            # SIGTERM drains: the run writes a checkpoint and goes back into the queue.
            stop_seconds = float(environment.get("STROP_STOP_SECONDS", "30")) + _WORKER_STOP_MARGIN_SECONDS
        self.processes[name] = Process(
            name,
            self._command(name),
            log=self.logs / f"{name}.log",
            environment=environment,
            folder=self.folder,
            stop_seconds=stop_seconds,
        )
        self.processes[name].start()

    def _command(self, name: str) -> list[str]:
        if name in ("api", "serving"):
            server = ["uvicorn", f"{name}.app:create_app", "--factory", "--host", "127.0.0.1"]
            port = ["--port", str(self._ports[name])]
            return [sys.executable, "-m", *server, *port, "--timeout-graceful-shutdown", "5", "--no-access-log"]
        queue = "prepare" if name.startswith("preparer") else "gpu"
        celery = ["celery", "-A", "worker.app", "worker", "-Q", queue, "-c", "1", "-n", f"{name}@%h"]
        return [sys.executable, "-m", *celery, "--without-gossip", "--without-mingle", "--loglevel", "INFO"]

    def _take_lock(self) -> None:
        """One stack per home. The lock falls with this process, so there is none to clear after a kill."""
        lock = (self.home / "stack.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StackError(f"another stack runs in {self.home}: stop it, or give this one its own --home") from None
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _choose_ports(self) -> None:
        deadline = time.monotonic() + _PORT_WAIT_SECONDS
        for name, port in self._ports.items():
            if port is None:
                self._ports[name] = free_port()
                continue
            # The services of a stack that was killed may need a moment to end.
            while not port_is_free(port):
                if time.monotonic() > deadline:
                    raise StackError(f"port {port} is taken: stop what listens there, or give another with --{name}-port")
                time.sleep(0.2)


def _readiness(url: str) -> str | None:
    """None when ready, else why not."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return None if answer.status_code == 200 else f"{answer.status_code} {answer.text[:300]}"
