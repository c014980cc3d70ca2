"""The main job, as a new user would do it over HTTP: upload, plan, submit, watch, compare, deploy, ask.

Everything goes through the two public services of a running stack, with the key a user has. What the numbers must show is
decided in standalone/verdict.py.
"""

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from standalone import base_model
from standalone.process import StackError
from standalone.progress import LiveLine, clock, memory_gib, say, step_line, table
from standalone.stack import ROOT, Stack
from standalone.verdict import Check, answers_check, training_checks

DATA = ROOT / "examples" / "data" / "alpaca_seed_en.jsonl"
ADAPTER = "demo"
QUESTIONS = (
    "Give me three tips for staying healthy.",
    "Write a short email asking a colleague to move our meeting to Friday.",
    "What is the difference between a list and a tuple in Python?",
)
MAX_TOKENS = 48
_WAIT_SECONDS = 600.0


def job_spec(dataset_id: str) -> dict[str, Any]:
    """A LoRA job that learns something visible from 143 rows in a few minutes on two cores."""
    return {
        "base_model": base_model.NAME,
        "adapter_name": ADAPTER,
        "objective": {"kind": "sft", "train_on": "all_turns"},
        "tuning": {"kind": "lora", "rank": 8, "alpha": 16.0, "target_modules": "all-linear"},
        "data": {"datasets": [{"dataset_id": dataset_id}], "max_length": 256, "eval_rows": 32},
        "optim": {"learning_rate": 5e-4},
        "schedule": {"kind": "cosine", "warmup_steps": 5, "epochs": 1.0},
        "batch": {"micro_batch_size": 2},
        "metadata": {"made_by": "make demo"},
    }


def walk(stack: Stack) -> list[Check]:
    """The whole walk, told on the terminal as it goes. Raises StackError when a step of it fails."""
    with (
        httpx.Client(base_url=stack.api_url, headers=stack.headers, timeout=60, trust_env=False) as api,
        httpx.Client(base_url=stack.serving_url, headers=stack.headers, timeout=300, trust_env=False) as serving,
    ):
        dataset = _upload(api, DATA)
        spec = job_spec(dataset["id"])
        _plan(api, spec)
        job_id = _submit(api, spec)
        _watch(api, job_id)
        job = _finished_job(api, job_id)
        checks = training_checks(_events(api, job_id))
        _deploy(api, serving, job["adapter_id"])
        answers = [
            (question, _ask(serving, base_model.NAME, question), _ask(serving, ADAPTER, question)) for question in QUESTIONS
        ]
    for question, base, adapter in answers:
        say(f"\n  Q        {question}\n  base     {_one_line(base)}\n  adapter  {_one_line(adapter)}")
    return [*checks, answers_check(answers)]


def print_verdict(checks: list[Check]) -> bool:
    """The table at the end; true when every check passed."""
    say()
    say(table([("yes" if check.passed else "NO", check.claim, check.found) for check in checks]))
    return all(check.passed for check in checks)


def _upload(api: httpx.Client, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        dataset: dict[str, Any] = _json(api.post("/datasets", files={"file": (path.name, file)}, data={"name": path.stem}))
    deadline = time.monotonic() + _WAIT_SECONDS
    while dataset["status"] == "uploaded":
        _pause(deadline, "the dataset's report")
        dataset = _json(api.get(f"/datasets/{dataset['id']}"))
    report = dataset["report"]
    if dataset["status"] != "ready":
        raise StackError(f"the dataset was refused: {json.dumps(report)[:2000]}")
    say(f"dataset   {path.name}: {report['usable_rows']} usable rows of {report['rows']}, {report['warning_count']} warnings")
    return dataset


def _plan(api: httpx.Client, spec: dict[str, Any]) -> None:
    """What can be known before the data is tokenised, which the submitted job has done."""
    plan = _json(api.post("/jobs/plan", json=spec))
    fits = {True: ", fits", False: ", does not fit", None: ""}[plan["fits"]]
    say(f"plan      {plan['trainable_parameters']:,} trainable parameters, {plan['memory']['total_gib']:.1f} GiB{fits}")
    for warning in plan["warnings"]:
        say(f"          {warning}")


def _submit(api: httpx.Client, spec: dict[str, Any]) -> str:
    job_id: str = _json(api.post("/jobs", json=spec, headers={"Idempotency-Key": str(uuid.uuid4())}))["id"]
    say(f"job       {job_id}: LoRA rank {spec['tuning']['rank']} on {spec['base_model']}")
    deadline = time.monotonic() + _WAIT_SECONDS
    while (job := _json(api.get(f"/jobs/{job_id}")))["status"] == "validating_files":
        _pause(deadline, "the tokens")
    for counts in job["tokens"]:
        say(
            f"tokens    {counts['tokens']:,} in {counts['rows']} rows, {counts['trained_tokens']:,} of them trained on; "
            f"{counts['truncated_rows']} rows cut"
        )
    return job_id


def _watch(api: httpx.Client, job_id: str) -> None:
    """Follow the metrics stream to its end, reconnecting after the last event seen."""
    line = LiveLine()
    last_id: str | None = None
    attempt = 0
    total: int | None = None
    peak_gib = 0.0
    started = time.monotonic()
    deadline = started + _WAIT_SECONDS
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        try:
            with api.stream("GET", f"/jobs/{job_id}/metrics", headers=headers, timeout=60) as answer:
                _raise_for(answer)
                for event_id, kind, data in _server_sent(answer.iter_lines()):
                    last_id = event_id or last_id
                    if kind == "step":
                        if data["attempt"] != attempt:
                            line.end()
                            attempt = data["attempt"]
                            total = _json(api.get(f"/jobs/{job_id}"))["total_steps"]
                            say(f"training  attempt {attempt}, {total} steps")
                        peak_gib = max(peak_gib, memory_gib(data))
                        line.show(step_line(data, total, peak_gib))
        except httpx.TransportError:
            pass  # the stream broke off: the job's status below decides whether to go on after the last event
        if _json(api.get(f"/jobs/{job_id}"))["status"] in ("succeeded", "failed", "cancelled"):
            line.end()
            say(f"trained   in {clock(time.monotonic() - started)}")
            return
        _pause(deadline, "the job's end")


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, event, data) of each event of a text/event-stream (WHATWG HTML 9.2). Comments and empty events are skipped."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "data" in fields:
                yield fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"])
            fields = {}


def _finished_job(api: httpx.Client, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = _json(api.get(f"/jobs/{job_id}"))
    if job["status"] != "succeeded":
        log = api.get(f"/jobs/{job_id}/logs").text[-3000:]
        raise StackError(f"the job ended as {job['status']} ({job['reason']}): {job['message']}\nThe end of its log:\n{log}")
    return job


def _events(api: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    cursor = "0-0"
    while True:
        page = _json(api.get(f"/jobs/{job_id}/events", params={"cursor": cursor}))
        events += page["data"]
        if not page["has_more"]:
            return events
        cursor = page["next_cursor"]


def _deploy(api: httpx.Client, serving: httpx.Client, adapter_id: str) -> None:
    _json(api.post(f"/adapters/{adapter_id}/deploy", json={}))
    started = time.monotonic()
    deadline = started + _WAIT_SECONDS
    while ADAPTER not in [model["id"] for model in _json(serving.get("/v1/models"))["data"]]:
        _pause(deadline, "the adapter to be served")
    say(f"adapter   {ADAPTER} deployed, served after {time.monotonic() - started:.1f} s")


def _ask(serving: httpx.Client, model: str, question: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": MAX_TOKENS, "temperature": 0}
    text: str = _json(serving.post("/generate", json=body))["text"]
    return text


def _json(answer: httpx.Response) -> Any:
    _raise_for(answer)
    return answer.json()


def _raise_for(answer: httpx.Response) -> None:
    if answer.status_code >= 400:
        answer.read()
        request = answer.request
        raise StackError(f"{request.method} {request.url.path} answered {answer.status_code}: {answer.text[:2000]}")


def _pause(deadline: float, waiting_for: str) -> None:
    if time.monotonic() > deadline:
        raise StackError(f"gave up waiting for {waiting_for} after {_WAIT_SECONDS:.0f} s")
    time.sleep(0.3)


def _one_line(text: str) -> str:
    return " ".join(text.split())
