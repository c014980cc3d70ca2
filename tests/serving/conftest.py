"""A running endpoint: uvicorn on a port, its own Postgres and files, the tiny model registered, keys of two projects."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from peft import PeftModel
from transformers import AutoModelForCausalLM

from core.adapter import ADAPTER_KIND, PARITY_FILE, AdapterFacts, BaseIdentity, ParityProbe, ParityRecordV1
from core.data.template import choose_template
from core.data.tokenizer import Tokenizer
from core.eval.logprobs import sequence_logprobs
from core.manifest import closed_folder, folder_bytes, folder_digest
from core.model_folder import read_model_facts
from serving.app import create_app
from store.adapters import deploy, undeploy
from store.db import Database
from store.files import Storage, adapter_key
from store.ids import new_id
from store.keys import create_key
from store.models import register_model
from store.settings import Settings
from store.tables import DEFAULT_PROJECT, Adapter, AdapterVersion, Job, Project, Receipt
from tests.lora import add_lora, copy_tokenizer
from tests.tiny import build_tiny_model

OTHER_PROJECT = "prj_other"
PROBE = [1, 300, 45, 120, 260, 2, 90, 33, 400, 7, 1, 55, 61, 62]


def wait_for(claim: Callable[[], Any], *, seconds: float = 30) -> Any:
    """The first true value of `claim`; an assertion error after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
    return value


@dataclass(frozen=True)
class Published:
    adapter_id: str
    version: int
    folder: Path


@dataclass
class Service:
    """What a test needs to act as control plane, trainer and client."""

    settings: Settings
    database: Database
    storage: Storage
    model: Path
    weights: str
    workshop: Path
    key: str
    other_key: str
    client: httpx.Client
    app: Any = None

    def publish(
        self,
        seed: int,
        *,
        name: str = "pirate",
        project: str = DEFAULT_PROJECT,
        tuning: str = "lora",
        base: dict[str, str] | None = None,
        scale: float = 0.3,
        make: Callable[[Path], object] | None = None,
        change: Callable[[Path], None] = lambda folder: None,
        parity: Callable[[ParityRecordV1], ParityRecordV1] = lambda record: record,
    ) -> Published:
        """What a finished job leaves: a closed, stored folder with its parity record, and its rows. `make` writes another
        adapter than the random one of `seed`; `change` may spoil the folder's content before it is closed."""
        identity = BaseIdentity(**{"model": "tiny", "weights": self.weights, "compute_dtype": "fp32", **(base or {})})
        folder = self.workshop / new_id("result")
        template = choose_template("model", Tokenizer.from_folder(self.model)).digest
        facts = AdapterFacts(
            tuning=tuning, base=identity, job_id="", attempt=1, step=1, rank=4, template=template, eval_loss=None
        )
        with closed_folder(folder, ADAPTER_KIND, facts.model_dump()) as temporary:
            if make is not None:
                make(temporary)
            elif tuning == "lora":
                add_lora(self.model, temporary, seed, scale=scale)
            else:
                build_tiny_model(temporary, seed=seed)
                copy_tokenizer(self.model, temporary)
            record = parity(self._measure(temporary, tuning))
            (temporary / PARITY_FILE).write_text(record.model_dump_json())
            change(temporary)
        return self.publish_result(folder, facts, name=name, project=project)

    def publish_result(self, folder: Path, facts: AdapterFacts, *, name: str, project: str = DEFAULT_PROJECT) -> Published:
        """Store a closed adapter folder as a new version of `name`."""
        sha256, size = folder_digest(folder), folder_bytes(folder)
        self.storage.publish_folder(folder, adapter_key(sha256))
        with self.database.transaction() as session:
            adapter = session.query(Adapter).filter_by(project_id=project, name=name).one_or_none()
            if adapter is None:
                adapter = Adapter(id=new_id("ada"), project_id=project, name=name)
                session.add(adapter)
            job = Job(id=new_id("job"), project_id=project, spec={}, base_model="tiny", status="succeeded")
            session.add(job)
            session.flush()
            version = 1 + session.query(AdapterVersion).filter_by(adapter_id=adapter.id).count()
            session.add(
                AdapterVersion(
                    adapter_id=adapter.id,
                    version=version,
                    project_id=project,
                    sha256=sha256,
                    bytes=size,
                    job_id=job.id,
                    facts=facts.model_dump(),
                )
            )
        return Published(adapter.id, version, self.storage.fetch_folder(adapter_key(sha256)))

    def _measure(self, folder: Path, tuning: str) -> ParityRecordV1:
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        base_logprobs = sequence_logprobs(base, PROBE, 4)
        if tuning == "lora":
            trained = PeftModel.from_pretrained(base, str(folder)).eval()
        else:
            trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        probe = ParityProbe(token_ids=PROBE, start=4, logprobs=sequence_logprobs(trained, PROBE, 4), base_logprobs=base_logprobs)
        return ParityRecordV1(device="cpu", compute_dtype="fp32", probes=[probe])

    def deploy(self, published: Published, project: str = DEFAULT_PROJECT) -> None:
        with self.database.transaction() as session:
            deploy(session, project, published.adapter_id, published.version)

    def undeploy(self, published: Published, project: str = DEFAULT_PROJECT) -> None:
        with self.database.transaction() as session:
            undeploy(session, project, published.adapter_id, published.version)

    def receipts(self, published: Published) -> list[Receipt]:
        with self.database.transaction() as session:
            rows = session.query(Receipt).filter_by(adapter_id=published.adapter_id, version=published.version)
            return list(rows.order_by(Receipt.id))

    def failed_receipt(self, published: Published) -> Receipt:
        """The failed check of a version, once the endpoint has made it."""
        return wait_for(lambda: next((row for row in self.receipts(published) if not row.passed), None))

    def models(self, key: str | None = None) -> list[str]:
        response = self.client.get("/v1/models", headers=self.bearer(key))
        return [line["id"] for line in response.json()["data"]]

    def wait_routable(self, name: str, key: str | None = None) -> None:
        wait_for(lambda: name in self.models(key))

    def bearer(self, key: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {key or self.key}"}

    def ask(self, model: str, *, key: str | None = None, **options: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
        if "prompt" in options or "messages" in options:
            del body["messages"]
        body |= {"max_tokens": 16, "temperature": 0, **options}
        return self.client.post("/generate", json=body, headers=self.bearer(key))

    def stream(self, model: str, **options: Any) -> tuple[list[dict[str, Any]], str]:
        """(chunks, last data line)."""
        lines = [line for line in self.ask(model, stream=True, **options).text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        datas = [line.removeprefix("data: ") for line in lines]
        return [json.loads(data) for data in datas[:-1]], datas[-1]


@pytest.fixture
def prepared(settings: Settings, database: Database, tiny_model: Path, tmp_path: Path) -> Iterator[Service]:
    """Everything but the running endpoint."""
    chosen = settings.model_copy(update={"models": tiny_model.parent, "bases": ("tiny:fp32",), "poll_seconds": 600.0})
    facts = read_model_facts(tiny_model)
    with database.transaction() as session:
        register_model(session, "tiny", tiny_model.name, facts)
        session.add(Project(id=OTHER_PROJECT, name="other"))
        session.flush()
        _, key = create_key(session, chosen.pepper, DEFAULT_PROJECT, name="k", scopes=["models:infer"])
        _, other_key = create_key(session, chosen.pepper, OTHER_PROJECT, name="k", scopes=["models:infer"])
    with httpx.Client(timeout=30) as client:
        yield Service(
            settings=chosen,
            database=database,
            storage=Storage(chosen.storage, chosen.scratch_folder),
            model=tiny_model,
            weights=facts.weights,
            workshop=tmp_path / "workshop",
            key=key,
            other_key=other_key,
            client=client,
        )


@pytest.fixture
def service(prepared: Service) -> Iterator[Service]:
    """A running endpoint that is ready, and polls so rarely that only NOTIFY tells it of a deployment."""
    with running(prepared):
        yield prepared


class running:
    """Run the endpoint of a prepared service under uvicorn until the block ends."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def __enter__(self) -> Service:
        app = create_app(self._service.settings)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        self._service.client.base_url = httpx.URL(f"http://127.0.0.1:{listener.getsockname()[1]}")
        self._service.app = app
        wait_for(lambda: self._server.started or not self._thread.is_alive())
        wait_for(lambda: self._service.client.get("/readyz").status_code == 200)
        return self._service

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
