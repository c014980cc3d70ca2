"""The case `train-to-serve` of benchmarks/serve.py: a training ends, and its adapter answers.

A whole service (embedded Postgres and Redis, every process real) trains short jobs, one after another, on the base that its
endpoint has in memory. The clock runs from the moment the training process says that it has ended, its result and parity
record written, until the first token of that version arrives over HTTP. A client follows the job's events, deploys the result
when the job has succeeded, and asks until it is answered. The first job warms up.

Where the seconds go is told beside: until the worker has published the result (`ended_to_published`: the process's end, the
files' digests, the record), until the client has heard and deployed (`published_to_deployed`), the endpoint's checks
(`deployed_to_checked`; each check by itself, from its receipt), and the first answer (`checked_to_first_token`). Before all of
it stands what the child does between its last step and its end (`last_step_to_ended`): weights and record written.
"""

import argparse
import statistics
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.results import ROOT, Results
from benchmarks.serve import add, spread_of
from standalone.gpu import serving_share_gib
from standalone.stack import Stack
from tests.e2e.service import Service

JOBS = 4
"""The first of them warms up."""
STEPS = 4
_ROWS = ROOT / "examples" / "data" / "alpaca_seed_en.jsonl"
_READY_SECONDS = 600.0
_ASK_SECONDS = 0.01
_PATIENCE_SECONDS = 120.0
_MORE_ROOM = 1.4
"""Times the share of a card that an endpoint takes beside training: an 8B in bf16 with its graphs is close to it."""

Seconds = dict[str, float]


def train_to_serve(results: Results, name: str, model: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Add the seconds from a training's end to its adapter's first token, and those of each stop between.

    Raises NoMeasurementError for a job that does not succeed, and for a version that the endpoint refuses.
    """
    settings = {"STROP_MODELS": str(model.parent), "STROP_BASES": model.name}
    if (share := serving_share_gib()) is not None:
        settings["STROP_SERVING_GPU_GIB"] = f"{_MORE_ROOM * share:.1f}"
    measured: list[Seconds] = []
    with Stack(work / "train-to-serve", settings=settings, ready_seconds=_READY_SECONDS) as stack:
        service = Service(stack.api_url, stack.serving_url, stack.api_key, patience_seconds=_READY_SECONDS)
        dataset_id = service.ready_dataset(_ROWS)
        for number in range(max(2, min(JOBS, arguments.waves + 1))):
            stops, checks = _once(service, _spec(model.name, dataset_id, seed=number), stack.headers)
            said = ", ".join(f"{what} {seconds:.3f}" for what, seconds in (stops | checks).items())
            print(f"{name}: job {number + 1}: {said}", flush=True)
            measured.append(stops | {f"check_{check}": seconds for check, seconds in checks.items()})
        service.close()
    for what in measured[-1]:
        seconds = [one[what] for one in measured[1:]]
        metric = f"{what}_seconds"
        add(results, name, metric, statistics.median(seconds), "s", better="lower", n=len(seconds), spread=spread_of(seconds))


def _spec(model: str, dataset_id: str, seed: int) -> dict[str, Any]:
    """Enough steps that the adapter does something, on all linear modules; sixteen held-out rows, which become the probes."""
    return {
        "base_model": model,
        "adapter_name": "train-to-serve",
        "data": {"datasets": [{"dataset_id": dataset_id}], "max_length": 256, "eval_rows": 16},
        "tuning": {"kind": "lora", "rank": 16, "alpha": 32},
        "optim": {"learning_rate": 1e-3},
        "batch": {"micro_batch_size": 4},
        "schedule": {"max_steps": STEPS, "epochs": float(STEPS)},
        "checkpoints": {"every_steps": None},
        "seed": seed,
    }


def _once(service: Service, spec: dict[str, Any], headers: dict[str, str]) -> tuple[Seconds, Seconds]:
    """(seconds from stop to stop and over all, seconds of each check) of one job."""
    from benchmarks.waves import NoMeasurementError

    job_id = service.submit(spec)["id"]
    for _ in service.live_metrics(job_id):
        pass  # the stream ends with the job
    job = service.ended_job(job_id)
    if job["status"] != "succeeded":
        raise NoMeasurementError(f"the job {job['status']}: {job['message']}")
    deployed = service.api.post(f"/adapters/{job['adapter_id']}/deploy", json={"version": job["adapter_version"]})
    deployed.raise_for_status()
    at_deployed = time.time()
    at_token = _first_token(service.serving, f"{spec['adapter_name']}@{job['adapter_version']}", headers)

    events = service.events(job_id)
    at_saving = next(event for event in events if event["kind"] == "phase" and event["data"]["phase"] == "saving")["at"]
    at_ended = next(event for event in events if event["kind"] == "ended")["at"]
    adapter = service.api.get(f"/adapters/{job['adapter_id']}").raise_for_status().json()
    receipts = next(one for one in adapter["versions"] if one["version"] == job["adapter_version"])["receipts"]
    moments = {
        "ended": _unix(at_ended),
        "published": _unix(job["ended_at"]),
        "deployed": at_deployed,
        "checked": max(_unix(receipt["at"]) for receipt in receipts),
        "first_token": at_token,
    }
    stops = {"last_step_to_ended": moments["ended"] - _unix(at_saving)}
    stops |= {f"{one}_to_{other}": moments[other] - moments[one] for one, other in pairwise(moments)}
    stops["ended_to_first_token"] = at_token - moments["ended"]
    return stops, {receipt["check"]: receipt["numbers"]["seconds"] for receipt in reversed(receipts)}


def _first_token(serving: httpx.Client, model: str, headers: dict[str, str]) -> float:
    """Ask until it is answered; the moment of the first token. Raises NoMeasurementError."""
    from benchmarks.waves import NoMeasurementError

    body = {"model": model, "prompt": "QXZ", "max_tokens": 1, "temperature": 0, "ignore_eos": True, "stream": True}
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with serving.stream("POST", "/generate", json=body, headers=headers) as answer:
            if answer.status_code == 200:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        return time.time()
                raise NoMeasurementError(f"{model}: a stream without a token")
            message = answer.read().decode(errors="replace")
        # Unknown until the endpoint has heard of it, then loading; a version that failed its checks is unknown for good.
        if answer.status_code not in (404, 503) or "does not serve it" in message:
            raise NoMeasurementError(f"{model} is not served: {answer.status_code} {message}")
        time.sleep(_ASK_SECONDS)
    raise NoMeasurementError(f"{model} does not answer after {_PATIENCE_SECONDS:.0f} s: {message}")


def _unix(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
