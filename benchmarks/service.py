"""What the service costs a run: `python -m benchmarks.service --shape llama-1.1b --models DIR` on a GPU, `--shape tiny` anywhere.

Starts a whole service but for the endpoint (embedded Postgres and Redis, every process real) and puts the case
`<shape>/lora/all/short` of benchmarks/train.py through it by REST: an event every step, a checkpoint every 100. A second job of
a few steps then finds every compile cache warm; `ready` is the time from its claim to its first step. Last the child trains
alone, on the rows that the service tokenised, without service or checkpoints. `share_of_bare` is the tokens a second of the
service, by the wall from first to last step, over those of the child alone.
"""

import argparse
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import said, short_lengths, train
from benchmarks.results import FOLDER, Results
from benchmarks.shapes import SHAPES, made
from benchmarks.train import CASES, TIERS, spec_of
from core.catalog import Tier
from core.spec import JobSpec
from standalone.stack import Stack
from tests.e2e.service import Service

STEPS = 300
CHECKPOINT_EVERY = 100
SHARE_MUST, SHARE_AIM = 0.97, 0.99
READY_MUST, READY_AIM = 20.0, 10.0
_STEPS_WORTH_OF_ROWS = 30
_READY_STEPS = 3
_TEMPLATE_TOKENS = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tier", choices=TIERS, default="fused")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--models", type=Path, help="where model folders are made, or stand already")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="strop-service-") as folder:
        home = Path(folder)
        models = arguments.models.absolute() if arguments.models else home / "models"
        device = made(arguments.shape, models / arguments.shape)
        results = Results("service", device, folder=arguments.out, commit=arguments.commit)
        measure(results, arguments.shape, arguments.tier, arguments.steps, models, home)


def measure(results: Results, shape: str, tier: Tier, steps: int, models: Path, home: Path) -> None:
    """Add the rows of one shape. Ends the process with what went wrong, in words, before a wrong number is stored."""
    case = f"{shape}/lora/all/short"
    dataset = home / "rows.jsonl"
    write_rows(dataset, CASES[case].rows * min(steps, _STEPS_WORTH_OF_ROWS))
    settings = {"STROP_MODELS": str(models), "OMP_NUM_THREADS": "1"}  # as the child alone has it
    with Stack(home / "stack", services=("api", "preparer", "worker"), settings=settings, ready_seconds=300) as stack:
        service = Service(stack.api_url, stack.serving_url, stack.api_key, patience_seconds=600)
        dataset_id = service.ready_dataset(dataset)
        long, short = (service_spec(case, tier, shape, dataset_id, count) for count in (steps, _READY_STEPS))
        events = _run(service, long, tier, steps)
        ready = _run(service, short, tier, _READY_STEPS)
        service.close()
        (cache,) = (stack.home / "files" / "datasets" / dataset_id / "tokens").iterdir()
    walls = [event["at"] for event in events if event["kind"] == "step"]
    served = _speed([event["data"]["tokens"] for event in events if event["kind"] == "step"], walls)

    bare = long.model_copy(update={"checkpoints": spec_of(case, tier, steps).checkpoints})
    alone, log = train(models / shape, cache, bare, home / "alone")
    found = [event for event in alone if event.kind == "step"]
    if len(found) < steps:
        sys.exit(f"the child alone: {'; '.join(said(alone))}\n{log[-2000:]}")
    unserved = _speed([event.tokens for event in found], [event.at for event in found])

    row, n = f"service/{case}", steps - 1
    is_judged = shape != "tiny"
    must, aim = (SHARE_MUST, SHARE_AIM) if is_judged else (None, None)
    results.add(row, "share_of_bare", served / unserved, "", better="higher", n=n, must=must, aim=aim)
    results.add(row, "tokens_per_second", served, "tokens/s", better="higher", n=n)
    results.add(row, "bare_tokens_per_second", unserved, "tokens/s", better="higher", n=n)
    row = f"ready/{shape}"
    must, aim = (READY_MUST, READY_AIM) if is_judged else (None, None)
    results.add(row, "claimed_to_first_step_seconds", _ready_seconds(ready), "s", better="lower", must=must, aim=aim)
    results.add(row, "claimed_to_first_step_cold_seconds", _ready_seconds(events), "s", better="lower")


def service_spec(case: str, tier: Tier, model: str, dataset_id: str, steps: int) -> JobSpec:
    """The case as a job of that many steps over an uploaded dataset."""
    fields: dict[str, Any] = spec_of(case, tier, steps).model_dump(mode="json")
    fields["base_model"] = model
    fields["data"]["datasets"] = [{"dataset_id": dataset_id}]
    fields["checkpoints"]["every_steps"] = CHECKPOINT_EVERY
    return JobSpec.model_validate(fields)


def write_rows(path: Path, count: int) -> None:
    """Conversations as long as the documents of benchmarks/train.py: letters that the tiny tokenizer joins into nothing."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for length in short_lengths(rng, count, 512).tolist():
            letters = "".join(rng.choice(list("QXZKVWJ"), max(2, length - _TEMPLATE_TOKENS)))
            question = max(1, int(len(letters) * rng.uniform(0.3, 0.7)))
            file.write(json.dumps({"instruction": letters[:question], "output": letters[question:] or "Q"}) + "\n")


def _run(service: Service, spec: JobSpec, tier: Tier, steps: int) -> list[dict[str, Any]]:
    """Events of a job that did what was asked: every step, every checkpoint, the tier. Ends the process where one did not.

    The claim comes first, as an event of kind `claimed` by the run's own row.
    """
    job = service.ended_job(service.submit(spec.model_dump(mode="json"))["id"])
    events = [event | {"at": _seconds(event["at"])} for event in service.events(job["id"])]
    numbers = [event["data"]["step"] for event in events if event["kind"] == "step"]
    tiers = [event["data"]["tier"] for event in events if event["kind"] == "started"]
    written = [event["data"]["step"] for event in events if event["kind"] == "checkpoint"]
    expected = list(range(CHECKPOINT_EVERY, steps + 1, CHECKPOINT_EVERY))
    if job["status"] != "succeeded" or numbers != list(range(1, steps + 1)) or tiers != [tier] or written != expected:
        seen = f"{len(numbers)} steps on {tiers}, checkpoints of {written}"
        sys.exit(f"the job {job['status']}: {job['message']} ({seen}; asked for {steps} on {tier}, checkpoints of {expected})")
    claimed = {"kind": "claimed", "at": _seconds(job["runs"][0]["started_at"]), "data": {}}
    return [claimed, *events]


def _ready_seconds(events: list[dict[str, Any]]) -> float:
    return float(next(event["at"] for event in events if event["kind"] == "step") - events[0]["at"])


def _speed(tokens: list[int], ends: list[float]) -> float:
    """Tokens a second from the end of the first step to the end of the last."""
    return sum(tokens[1:]) / (ends[-1] - ends[0])


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


if __name__ == "__main__":
    main()
