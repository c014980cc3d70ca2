"""A worker's sign of life in the record: which queues it answers, on which device, with how much GPU memory.

The device is found without torch, so that no long-lived process of the service loads it.
"""

import logging
import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from store import nodes
from store.db import UNREACHABLE, Database
from store.settings import Settings

log = logging.getLogger(__name__)

_SMI_SECONDS = 20


class Presence:
    """A thread that registers the worker, beats, and signs off in the end."""

    def __init__(self, settings: Settings, database: Database, *, boot_id: str, name: str, queues: list[str]) -> None:
        self._database = database
        self._every_seconds = settings.heartbeat_seconds
        self._boot_id = boot_id
        self._name = name
        self._queues = sorted(queues)
        self._settings = settings
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        try:
            with self._database.transaction() as session:
                nodes.leave(session, self._boot_id)
        except UNREACHABLE as error:
            log.warning("not signed off, the database is away: %s", type(error).__name__)

    def _work(self) -> None:
        gpu = find_gpu()
        budget = self._settings.gpu_budget_gib
        if budget is None and gpu is not None:
            budget = gpu.memory_gib - (self._settings.serving_gpu_gib or 0.0)
        while True:
            try:
                with self._database.transaction() as session:
                    if not nodes.beat(session, self._boot_id):
                        nodes.register(
                            session,
                            boot_id=self._boot_id,
                            name=self._name,
                            queues=self._queues,
                            device="cpu" if gpu is None else gpu.name,
                            budget_gib=budget,
                        )
            except UNREACHABLE as error:
                log.warning("not seen, the database is away: %s", type(error).__name__)
            except Exception:  # the next beat goes on
                log.exception("not seen")
            if self._ended.wait(self._every_seconds):
                return


@dataclass(frozen=True)
class FoundGpu:
    name: str
    """As nvidia-smi gives it."""
    memory_gib: float


def find_gpu() -> FoundGpu | None:
    """The first GPU this worker may use; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or not Path("/proc/driver/nvidia/version").exists():
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if visible is not None:
        command += ["-i", visible.split(",")[0]]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        name, _, mebibytes = answer.stdout.splitlines()[0].rpartition(",")
        return FoundGpu(name.strip(), float(mebibytes) / 1024)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.warning("a GPU driver is here, but nvidia-smi gives no answer: %s", error)
        return None
