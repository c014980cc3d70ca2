"""The endpoint's second thread: loads the bases, then keeps what is in memory equal to what is deployed.

It listens for NOTIFY on its own connection and looks every few seconds in any case. A version is fetched, loaded and checked
(`verify.py`), its receipts are committed, and only then do requests reach it. A version that failed is tried again when it
is deployed anew, or when the fault was not its own. An undeployed one takes no more requests and leaves memory after its last.
"""

import itertools
import logging
import select
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import torch
from sqlalchemy.exc import SQLAlchemyError

from core.errors import StropError
from core.infer.engine import Engine
from core.infer.servable import Servable
from serving.bases import Room, WantedBase, limit_gpu_memory, load_wanted
from serving.directory import Directory, Loading, NotServed, VersionKey
from serving.verify import Verdict, bring_up, release
from store.adapters import CHANNEL
from store.db import Database
from store.deployments import Check, DesiredVersion, beat, desired_versions, insert_receipts
from store.files import Storage, adapter_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Signature:
    """Who signs the receipts."""

    boot_id: str
    endpoint_name: str


class Follower:
    """`start` returns at once; `problem` says why the endpoint is not ready, or None."""

    def __init__(
        self,
        *,
        wanted: Sequence[WantedBase],
        models_folder: Path,
        gpu_gib: float | None,
        room: Room,
        device: torch.device,
        database: Database,
        storage: Storage,
        engine: Engine,
        directory: Directory,
        signature: Signature,
        poll_seconds: float,
    ) -> None:
        self._wanted = wanted
        self._models_folder = models_folder
        self._gpu_gib = gpu_gib
        self._room = room
        self._device = device
        self._database = database
        self._storage = storage
        self._engine = engine
        self._directory = directory
        self._signature = signature
        self._poll_seconds = poll_seconds
        self.problem: str | None = "the bases are being loaded"
        self._stays = itertools.count(1)
        self._stopping = threading.Event()
        self._wake, self._bell = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="deployments", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the version that is being loaded."""
        self._stopping.set()
        self._bell.send(b"x")
        self._thread.join()
        self._wake.close()
        self._bell.close()

    def _run(self) -> None:
        try:
            limit_gpu_memory(self._device, self._gpu_gib)
            for wanted in self._wanted:
                if self._stopping.is_set():
                    return
                self._directory.add_base(wanted.word, load_wanted(wanted, self._models_folder, self._device, room=self._room))
        except Exception as error:
            logger.exception("the bases can't be loaded")
            self.problem = f"a base can't be loaded: {error}"
            return
        listening: Any = None
        while not self._stopping.is_set():
            try:
                if listening is None:
                    listening = self._listen()
                self._catch_up()
                self.problem = None
                self._wait(listening)
            except (SQLAlchemyError, psycopg.Error, OSError) as error:
                logger.warning("deployments can't be followed: %s", error)
                self.problem = "the database can't be reached"
                if listening is not None:
                    listening.close()
                    listening = None
                self._stopping.wait(min(self._poll_seconds, 2.0))
        if listening is not None:
            listening.close()

    def _listen(self) -> Any:
        pooled = self._database.engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()  # a connection that listens must not go back to the pool
        connection.autocommit = True
        connection.execute(f"LISTEN {CHANNEL}")
        return connection

    def _wait(self, listening: Any) -> None:
        ready, _, _ = select.select([listening.fileno(), self._wake], [], [], self._poll_seconds)
        if listening.fileno() in ready:
            for _ in listening.notifies(timeout=0):
                pass  # one look answers them all

    def _catch_up(self) -> None:
        with self._database.transaction() as session:
            identities = [servable.host.identity for servable in self._directory.bases]
            beat(
                session,
                boot_id=self._signature.boot_id,
                name=self._signature.endpoint_name,
                bases=identities,
                device=self._device.type,
            )
            wanted = desired_versions(session)
        standings = self._directory.standings()
        for key in standings.keys() - {_key(version) for version in wanted}:
            self._drop(key)
        for version in wanted:
            if self._stopping.is_set():
                return
            standing = standings.get(_key(version))
            is_new = standing is None or isinstance(standing, Loading)
            is_retried = isinstance(standing, NotServed) and (standing.is_passing or standing.wanted_at < version.wanted_at)
            if is_new or is_retried:
                # A fault that has not passed is in the receipts already.
                self._serve(version, is_told=isinstance(standing, NotServed) and standing.wanted_at == version.wanted_at)

    def _serve(self, version: DesiredVersion, *, is_told: bool) -> None:
        self._directory.put(version, Loading())
        verdict, is_passing = self._verdict(version)
        try:
            if verdict.servable is not None or not is_told:
                with self._database.transaction() as session:
                    insert_receipts(
                        session,
                        version,
                        verdict.checks,
                        boot_id=self._signature.boot_id,
                        endpoint_name=self._signature.endpoint_name,
                    )
        except BaseException:
            if verdict.servable is not None:
                self._engine.retire(verdict.servable, lambda servable=verdict.servable: release(servable))  # type: ignore[misc]
            raise
        if verdict.servable is not None:
            logger.info("%s is served", version)
            self._directory.put(version, verdict.servable)
        else:
            logger.warning("%s is not served: %s", version, verdict.reason)
            self._directory.put(version, NotServed(verdict.reason, version.wanted_at, is_passing))

    def _verdict(self, version: DesiredVersion) -> tuple[Verdict, bool]:
        """The verdict, and whether a bad one is the surroundings' fault, to be tried again unasked."""
        try:
            folder = self._storage.fetch_folder(adapter_key(version.sha256))
        except FileNotFoundError:
            return _failed("files", "its files are not in the storage"), False
        except Exception as error:  # whatever a remote storage's client raises
            logger.exception("%s can't be fetched", version)
            return _failed("files", f"the storage can't be reached: {error}"), True
        bases = [servable.host for servable in self._directory.bases]
        # A name for this stay alone: its former one may not have left yet, and will be taken away by its name.
        name = f"{version.adapter_id}_{version.version}_{next(self._stays)}"
        try:
            return bring_up(folder, version.sha256, name, bases, self._engine, self._device), False
        except StropError as error:
            return _failed("load", str(error)), True
        except Exception:
            logger.exception("%s could not be checked", version)
            return _failed("load", "the endpoint failed on it; see its log"), False

    def _drop(self, key: VersionKey) -> None:
        standing = self._directory.remove(key)
        if isinstance(standing, Servable):
            self._engine.retire(standing, lambda: release(standing))


def _failed(check: str, reason: str) -> Verdict:
    return Verdict([Check(check, False, {"reason": reason})])


def _key(version: DesiredVersion) -> VersionKey:
    return version.adapter_id, version.version
