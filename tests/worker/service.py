"""A service for the worker's tests: rows and files of a job, real Celery workers, and questions to the record."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, func, select, text

from core.manifest import closed_folder
from core.records import EventRecord, TokenCounts
from core.run import TOKEN_CACHE_KIND
from core.spec import CheckpointSpec, DatasetRef, DataSpec, EvalSpec, GenerationEval, JobSpec, Objective, SftObjective
from core.states import DatasetStatus, JobStatus
from store import events, files, jobs, outbox
from store.db import Database
from store.files import Storage
from store.ids import new_id
from store.queue import Doorbell
from store.settings import Settings
from store.stream import Publisher
from store.tables import DEFAULT_PROJECT, AdapterVersion, Dataset, Job, Model, Run, TokenCache
from worker.context import Context, DrainFlag
from worker.scratch import Scratch

ROOT = Path(__file__).resolve().parents[2]
FAKE_CHILD = (sys.executable, "-m", "tests.worker.fake_child")
FAKE_PREPARER = (sys.executable, "-m", "tests.worker.fake_preparer")
TRAIN_FAST = [["train", 6, 2, 0]]


class Service:
    """One service's record, files and broker, seen from a test."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.settings = settings
        self.database = database
        self.storage = Storage(settings.storage, settings.scratch_folder / "cache")
        self.doorbell = Doorbell(settings, database)
        folder = settings.models_folder / "tiny"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        with database.transaction() as session:
            session.add(
                Model(
                    id=new_id("mdl"),
                    name="tiny",
                    architecture="LlamaForCausalLM",
                    parameters=1,
                    context_length=512,
                    weights="w" * 64,
                    tokenizer="t" * 64,
                    has_chat_template=True,
                    config={},
                    folder="tiny",
                )
            )

    def close(self) -> None:
        self.doorbell.close()

    def upload(self, text: str = "fine/fine", *, status: DatasetStatus = DatasetStatus.UPLOADED) -> str:
        """A dataset with its file; a bell where it waits to be validated."""
        dataset_id = new_id("ds")
        source = self.settings.home / dataset_id
        source.write_text(text)
        self.storage.put_file(source, files.upload_key(dataset_id))
        with self.database.transaction() as session:
            session.add(
                Dataset(
                    id=dataset_id,
                    project_id=DEFAULT_PROJECT,
                    name="d",
                    filename="d.json",
                    bytes=1,
                    sha256=dataset_id,
                    status=status,
                )
            )
            if status is DatasetStatus.UPLOADED:
                outbox.post(session, outbox.Bell(outbox.VALIDATE_DATASET, dataset_id))
        return dataset_id

    def job(
        self,
        script: list[Any] | None = None,
        *,
        dataset: str | None = None,
        keep: int = 2,
        objective: Objective | None = None,
        judge: bool = False,
        **attempts: Any,
    ) -> str:
        """A job that runs a script; queued where `dataset` is left out, else it waits for that dataset's tokens."""
        metadata = {"script": json.dumps(script or TRAIN_FAST)}
        metadata |= {name.replace("_", "-"): json.dumps(value) for name, value in attempts.items()}
        dataset_id = dataset or self.upload(status=DatasetStatus.READY)
        spec = JobSpec(
            base_model="tiny",
            objective=objective or SftObjective(),
            data=DataSpec(datasets=[DatasetRef(dataset_id=dataset_id)], eval_rows=int(judge)),
            eval=EvalSpec(generation=GenerationEval(), judge=True) if judge else EvalSpec(),
            checkpoints=CheckpointSpec(keep=keep),
            metadata=metadata,
        )
        if dataset is None:
            self._cache_tokens(dataset_id, spec)
        with self.database.transaction() as session:
            job, _ = jobs.create_job(session, DEFAULT_PROJECT, spec, dataset_digests={dataset_id: dataset_id}, tokenizer="t" * 64)
        return job.id

    def ring(self, job_id: str, task: str = outbox.RUN_JOB) -> None:
        self.doorbell.ring([outbox.Bell(task, job_id)])

    def cancel(self, job_id: str) -> None:
        with self.database.transaction() as session:
            jobs.cancel_job(session, DEFAULT_PROJECT, job_id)

    def read_job(self, job_id: str) -> Job:
        with self.database.transaction() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def read_runs(self, job_id: str) -> list[Run]:
        with self.database.transaction() as session:
            return list(session.scalars(select(Run).where(Run.job_id == job_id).order_by(Run.attempt)))

    def read_dataset(self, dataset_id: str) -> Dataset:
        with self.database.transaction() as session:
            return session.scalars(select(Dataset).where(Dataset.id == dataset_id)).one()

    def history(self, job_id: str, *kinds: str) -> list[EventRecord]:
        with self.database.transaction() as session:
            return events.after(session, job_id, events.START, kinds=kinds, limit=100_000)

    def statuses(self, job_id: str) -> list[tuple[str, str | None]]:
        return [(event.data["status"], event.data["reason"]) for event in self.history(job_id, "status")]

    def versions(self, job_id: str) -> int:
        with self.database.transaction() as session:
            count = select(func.count()).select_from(AdapterVersion).where(AdapterVersion.job_id == job_id)
            return session.scalar(count) or 0

    def bells(self) -> list[outbox.Bell]:
        with self.database.transaction() as session:
            return outbox.due(session, 0)

    def wait_job(self, job_id: str, *statuses: JobStatus, seconds: float = 40) -> Job:
        wait(lambda: self.read_job(job_id).status in statuses, seconds, lambda: f"{self.statuses(job_id)}")
        return self.read_job(job_id)

    def wait_event(self, job_id: str, kind: str, seconds: float = 40, **fields: Any) -> EventRecord:
        """The first event of a kind whose data holds the fields."""

        def found() -> list[EventRecord]:
            return [e for e in self.history(job_id, kind) if fields.items() <= e.data.items()]

        wait(lambda: bool(found()), seconds, lambda: f"{self.statuses(job_id)}")
        return found()[0]

    @contextmanager
    def context(self) -> Iterator[Context]:
        """The parts of a pool process, in this one."""
        boot_id = new_id("boot")
        database = Database(self.settings.database_url)
        context = Context(
            settings=self.settings,
            database=database,
            storage=self.storage,
            live=Publisher(self.settings.redis_url),
            doorbell=Doorbell(self.settings, database),
            scratch=Scratch(self.settings.scratch_folder, boot_id),
            boot_id=boot_id,
            name="test",
            drain=DrainFlag(),
        )
        yield context
        context.scratch.close()
        context.close()

    @contextmanager
    def worker(self, queue: str, app: str = "tests.worker.fake_app", **environment: str) -> Iterator["Worker"]:
        """A real Celery worker on a queue."""
        worker = Worker(self.settings, queue, app, environment)
        try:
            yield worker
        finally:
            worker.kill()

    def _cache_tokens(self, dataset_id: str, spec: JobSpec) -> None:
        key = jobs.token_key(dataset_id, "t" * 64, spec.data, spec.objective)
        folder = self.settings.home / "made" / key
        with closed_folder(folder, TOKEN_CACHE_KIND, {}) as draft:
            (draft / "ids").write_text("1 2 3")
        self.storage.publish_folder(folder, files.tokens_key(dataset_id, key))
        counts = TokenCounts(
            dataset_id=dataset_id,
            rows=3,
            tokens=30,
            trained_tokens=9,
            truncated_rows=0,
            rows_without_target=0,
            longest=10,
        )
        with self.database.transaction() as session:
            session.add(TokenCache(key=key, dataset_id=dataset_id, project_id=DEFAULT_PROJECT, counts=counts.model_dump()))


class Worker:
    """A Celery worker process with its pool and children."""

    def __init__(self, settings: Settings, queue: str, app: str, environment: dict[str, str]) -> None:
        self.log = settings.home / f"{queue}-{new_id('w')}.log"
        variables = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "STROP_HOME": str(settings.home),
            "DATABASE_URL": settings.database_url,
            "REDIS_URL": settings.redis_url,
            "STROP_LEASE_SECONDS": str(settings.lease_seconds),
            "STROP_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
            "STROP_FLUSH_SECONDS": str(settings.flush_seconds),
            "STROP_SWEEP_SECONDS": str(settings.sweep_seconds),
            "STROP_BELL_SECONDS": str(settings.bell_seconds),
            "STROP_STOP_SECONDS": str(settings.stop_seconds),
        }
        name = ["-n", f"{queue}-{new_id('n')}@test"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", app, "worker", "-Q", queue, "-c", "1", *name, "-l", "INFO"],
                env=variables | environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait(lambda: self.process.poll() is not None or "answers" in self.text(), 60, self.text)
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """The main process and all that descend from it."""
        found, parents = [self.process.pid], _parents()
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def kill(self) -> None:
        """SIGKILL to the main process alone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and wait."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def wait(is_true: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    """Poll until something is so; fail loudly otherwise."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not so within {seconds} s: {why()}"
        time.sleep(0.05)


def run_as_admin(postgres_url: str, statement: str) -> None:
    """A statement beside the service, outside any transaction."""
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _parents() -> dict[int, int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return parents
