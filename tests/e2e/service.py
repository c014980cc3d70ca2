"""The service as its users see it: one small HTTP client for the end-to-end tests and the walk benchmark."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ENDED = ("succeeded", "failed", "cancelled")


class Service:
    """Calls to the control plane and the endpoint of one stack. Every wait has a deadline and says what it last saw."""

    def __init__(self, api_url: str, serving_url: str, api_key: str, *, patience_seconds: float = 120.0) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self.api = httpx.Client(base_url=api_url, headers=headers, timeout=60, trust_env=False)
        self.serving = httpx.Client(base_url=serving_url, headers=headers, timeout=300, trust_env=False)
        self.patience_seconds = patience_seconds

    def close(self) -> None:
        self.api.close()
        self.serving.close()

    def upload(self, path: Path, name: str = "data") -> dict[str, Any]:
        with path.open("rb") as file:
            answer = self.api.post("/datasets", data={"name": name}, files={"file": (path.name, file)})
        return _json(answer, 201)

    def ready_dataset(self, path: Path) -> str:
        """Upload and wait for the report; the dataset's id."""
        dataset_id = self.upload(path)["id"]
        dataset = self._wait(lambda: self.dataset(dataset_id), lambda seen: seen["status"] != "uploaded", "the report")
        assert dataset["status"] == "ready", dataset
        return str(dataset_id)

    def dataset(self, dataset_id: str) -> dict[str, Any]:
        return _json(self.api.get(f"/datasets/{dataset_id}"))

    def submit(self, spec: dict[str, Any], **headers: str) -> dict[str, Any]:
        return _json(self.api.post("/jobs", json=spec, headers=headers), 201)

    def job(self, job_id: str) -> dict[str, Any]:
        return _json(self.api.get(f"/jobs/{job_id}"))

    def ended_job(self, job_id: str) -> dict[str, Any]:
        return self._wait(lambda: self.job(job_id), lambda seen: seen["status"] in ENDED, "the job's end")

    def job_at_step(self, job_id: str, step: int) -> dict[str, Any]:
        """Wait until a job has recorded a step (or has ended)."""
        return self._wait(
            lambda: self.job(job_id), lambda seen: (seen["step"] or 0) >= step or seen["status"] in ENDED, f"step {step}"
        )

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Those that are kept: what a resume may begin from."""
        kept: list[dict[str, Any]] = _json(self.api.get(f"/jobs/{job_id}/checkpoints"))["data"]
        return kept

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """All events of a job so far."""
        found: list[dict[str, Any]] = []
        cursor = "0-0"
        while True:
            page = _json(self.api.get(f"/jobs/{job_id}/events", params={"cursor": cursor}))
            found += page["data"]
            if not page["has_more"]:
                return found
            cursor = page["next_cursor"]

    def losses(self, job_id: str) -> dict[int, float]:
        """Step -> training loss, as the metrics resource shows it."""
        return {point["step"]: point["loss"] for point in self.metrics(job_id) if "loss" in point}

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            after = found[-1]["step"] if found else -1
            page = _json(self.api.get(f"/jobs/{job_id}/metrics", params={"after_step": after}))
            found += page["data"]
            if not page["has_more"]:
                return found

    def live_metrics(self, job_id: str, last_event_id: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(event, id, data) of the live stream until it ends by itself."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        with self.api.stream("GET", f"/jobs/{job_id}/metrics", headers=headers, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                if line.startswith(":"):
                    continue
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    yield fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"])
                    fields = {}

    def deploy(self, adapter_id: str) -> str:
        """Deploy the newest version and wait until the endpoint lists it; the adapter's name."""
        _json(self.api.post(f"/adapters/{adapter_id}/deploy", json={}))
        adapter = _json(self.api.get(f"/adapters/{adapter_id}"))
        version = f"{adapter['name']}@{adapter['latest_version']}"
        self._wait(self.served_models, lambda seen: version in seen, f"{version} to become routable")
        return str(adapter["name"])

    def undeploy(self, adapter_id: str, version: int) -> None:
        """Wait until the endpoint doesn't list the version any more."""
        name = _json(self.api.get(f"/adapters/{adapter_id}"))["name"]
        _json(self.api.post(f"/adapters/{adapter_id}/undeploy", json={"version": version}))
        self._wait(self.served_models, lambda seen: f"{name}@{version}" not in seen, f"{name}@{version} to leave")

    def served_models(self) -> list[str]:
        return [model["id"] for model in _json(self.serving.get("/v1/models"))["data"]]

    def generate(self, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 24} | fields
        return _json(self.serving.post("/generate", json=body))

    def download(self, adapter_id: str) -> bytes:
        answer = self.api.get(f"/adapters/{adapter_id}/download")
        assert answer.status_code == 200, answer.text
        return answer.content

    def _wait(self, look: Any, enough: Any, what: str) -> Any:
        deadline = time.monotonic() + self.patience_seconds
        while not enough(seen := look()):
            assert time.monotonic() < deadline, f"waited {self.patience_seconds:.0f} s for {what}; last seen: {seen}"
            time.sleep(0.1)
        return seen


def _json(answer: httpx.Response, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, f"{answer.request.method} {answer.request.url} -> {answer.status_code} {answer.text}"
    body: dict[str, Any] = answer.json()
    return body
