"""The main job's seconds, stop by stop: `python -m benchmarks.walk --shape tiny --cases lora,qlora,full`.

Starts a whole service (embedded Postgres and Redis, every process real) over a model of random weights at a given shape,
and walks each case through it over HTTP: upload, report, tokens, training, publishing, deployment, a generated answer.
Writes benchmarks/results/walk-<device>.json. Speed here includes checkpoints, events and everything the service does.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, ROOT, Results
from benchmarks.shapes import SHAPES
from standalone.stack import Stack
from tests.e2e.service import Service

CASES: dict[str, dict[str, Any]] = {
    "lora": {"tuning": {"kind": "lora", "rank": 16, "alpha": 32}},
    "qlora": {"tuning": {"kind": "lora", "rank": 16, "alpha": 32}, "quantization": {"kind": "nf4"}},
    "full": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 2e-5}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="strop-walk-") as folder:
        home = Path(folder)
        model = home / "models" / arguments.shape
        build = [sys.executable, "-W", "ignore", "-m", "benchmarks.shapes", arguments.shape, str(model)]
        device = subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
        results = Results("walk", device, folder=arguments.out, commit=arguments.commit)
        began = time.monotonic()
        bases = f"{arguments.shape},{arguments.shape}:nf4-double"
        with Stack(home, settings={"STROP_BASES": bases}, ready_seconds=300) as stack:
            results.add("stack", "up_seconds", time.monotonic() - began, "s", better="lower")
            service = Service(stack.api_url, stack.serving_url, stack.api_key, patience_seconds=600)
            for case in arguments.cases.split(","):
                walk(service, results, arguments.shape, case)


def walk(service: Service, results: Results, shape: str, case: str) -> None:
    """One job from upload to answer; every stop's seconds and the run's own figures become rows."""
    name = f"{shape}/{case}"
    marks = {"begin": time.monotonic()}
    dataset_id = service.ready_dataset(ROOT / "examples" / "data" / "alpaca_seed_en.jsonl")
    marks["dataset_ready"] = time.monotonic()
    spec = {
        "base_model": shape,
        "adapter_name": f"walk-{case}",
        "data": {"datasets": [{"dataset_id": dataset_id}], "max_length": 512, "eval_rows": 32},
        "schedule": {"kind": "cosine", "epochs": 4, "warmup_steps": 5},
        "batch": {"micro_batch_size": 8},
        "checkpoints": {"every_steps": 50},
    } | CASES[case]
    job_id = service.submit(spec)["id"]
    marks["submitted"] = time.monotonic()
    service.job_at_step(job_id, 1)
    marks["first_step"] = time.monotonic()
    job = service.ended_job(job_id)
    marks["ended"] = time.monotonic()
    assert job["status"] == "succeeded", job
    adapter = service.deploy(job["adapter_id"])
    marks["routable"] = time.monotonic()
    answer = service.generate(adapter, "What is the capital of France?")
    marks["answered"] = time.monotonic()
    assert answer["usage"]["completion_tokens"] > 0

    for earlier, later in itertools.pairwise(marks):
        results.add(name, f"{earlier}_to_{later}_seconds", marks[later] - marks[earlier], "s", better="lower")
    results.add(name, "whole_walk_seconds", marks["answered"] - marks["begin"], "s", better="lower")
    steps = [point for point in service.metrics(job_id) if "loss" in point]
    speeds = [point["tokens_per_second"] for point in steps[3:]]
    quartiles = statistics.quantiles(speeds, n=4)
    results.add(
        name,
        "tokens_per_second",
        statistics.median(speeds),
        "tokens/s",
        better="higher",
        n=len(speeds),
        spread=(quartiles[2] - quartiles[0]) / 2,
    )
    peaks = [point["peak_allocated_gib"] for point in steps if "peak_allocated_gib" in point]
    if peaks:
        results.add(name, "peak_allocated_gib", max(peaks), "GiB", better="lower")
    evals = [point["eval_loss"] for point in service.metrics(job_id) if "eval_loss" in point]
    results.add(name, "eval_loss_drop", evals[0] - evals[-1], "nats", better="higher", n=32)
    print(json.dumps({"case": name, "answer": answer["text"][:120]}), flush=True)


if __name__ == "__main__":
    main()
