"""What each lever of memory costs and saves: `python -m benchmarks.memory --shape llama-1.1b --cases base,checkpointing`.

Every case is one training child as a worker starts it, over rows of instruction length (log-normal, mean about 130 tokens),
32 rows a step. Peak memory is the child's own `peak_allocated_gib`, over everything from load on; speed is the median of the
steps after the fourth, real tokens only. A case that the plan refuses for the budget is recorded as planned, and not run.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import Rows, rows_of, said, short_lengths, train
from benchmarks.results import FOLDER, Results
from benchmarks.shapes import SHAPES, made
from core.model_folder import read_model_facts
from core.plan import plan
from core.spec import JobSpec
from tests.core.train.runs import write_cache

QV: dict[str, Any] = {"kind": "lora", "rank": 8, "alpha": 32.0, "target_modules": ["q_proj", "v_proj"]}
ALL: dict[str, Any] = {"kind": "lora", "rank": 16, "alpha": 32.0}
PLAIN: dict[str, Any] = {"micro_batch_size": 4, "gradient_accumulation_steps": 8, "packing": "off"}

CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "qv": {"tuning": QV},
    "plain": {"batch": PLAIN},
    "plain-grouped": {"batch": PLAIN | {"group_by_length": True}},
    "fp32": {"memory": {"precision": "fp32"}, "batch": PLAIN},
    "checkpointing": {"memory": {"checkpointing": True}},
    "checkpointing-every-2": {"memory": {"checkpointing": True, "checkpointing_every": 2}},
    "checkpointing-offload": {"memory": {"checkpointing": True, "checkpointing_offload": True}},
    "compile": {"memory": {"compile": True}},
    "nf4": {"quantization": {"kind": "nf4"}},
    "nf4-checkpointing": {"quantization": {"kind": "nf4"}, "memory": {"checkpointing": True}},
    "fp4": {"quantization": {"kind": "fp4"}},
    "int8": {"quantization": {"kind": "int8"}},
    "dora": {"tuning": ALL | {"dora": True}},
    "mora": {"tuning": {"kind": "mora", "rank": 8}},
    "full": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 2e-5}},
    "full-8bit": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 2e-5, "kind": "adamw_8bit"}},
    "full-paged-8bit": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 2e-5, "kind": "paged_adamw_8bit"}},
    "full-8bit-checkpointing": {
        "tuning": {"kind": "full"},
        "optim": {"learning_rate": 2e-5, "kind": "adamw_8bit"},
        "memory": {"checkpointing": True},
    },
    "half-batch": {"batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 8}},
}
_STEPS = 14
_ROWS_PER_STEP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--model", type=Path, help="a folder of the shape made before, or where to make it")
    parser.add_argument("--budget-gib", type=float, default=78.0)
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="no case is begun after that")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="strop-memory-") as folder:
        work = Path(folder)
        model = arguments.model or work / "model"
        device = made(arguments.shape, model)
        results = Results("memory", device, folder=arguments.out, commit=arguments.commit)
        facts = read_model_facts(model)
        cache = write_cache(work / "cache", _rows(_STEPS * _ROWS_PER_STEP))
        for case in arguments.cases.split(","):
            if time.monotonic() - began > arguments.limit_seconds:
                print(f"{case}: not begun, {arguments.limit_seconds:.0f} s are over", flush=True)
                continue
            spec = spec_of_case(case)
            planned = plan(
                spec,
                architecture=facts.architecture,
                parameters=facts.parameters,
                config=facts.config,
                counts=None,
                budget_gib=arguments.budget_gib,
            )
            name = f"{arguments.shape}/{case}"
            results.add(name, "planned_gib", planned.memory.total_gib, "GiB", better="lower")
            if planned.fits:
                _run(results, name, model, cache, spec, work / case)
            else:
                print(f"{name}: refused by its plan, {planned.memory.total_gib:.1f} of {arguments.budget_gib:g} GiB", flush=True)


def spec_of_case(case: str) -> JobSpec:
    fields: dict[str, Any] = {
        "base_model": "bench/model",
        "data": {"datasets": [{"dataset_id": "ds_00000000"}], "max_length": 512},
        "tuning": ALL,
        "batch": {"micro_batch_size": 8, "gradient_accumulation_steps": 4},
        "schedule": {"max_steps": _STEPS},
        "checkpoints": {"every_steps": None},
    }
    return JobSpec.model_validate(fields | CASES[case])


def _rows(count: int) -> Rows:
    rng = np.random.default_rng(0)
    return rows_of(rng, short_lengths(rng, count, 512))


def _run(results: Results, name: str, model: Path, cache: Path, spec: JobSpec, run_dir: Path) -> None:
    events, log = train(model, cache, spec, run_dir)
    steps = [event for event in events if event.kind == "step"]
    print(json.dumps({"case": name, "said": said(events), "losses": [round(step.loss, 3) for step in steps]}), flush=True)
    if len(steps) < _STEPS:
        print(f"{name}: ended after {len(steps)} steps\n{log[-2000:]}", flush=True)
        return
    speeds = [step.tokens_per_second for step in steps[4:]]
    quartiles = statistics.quantiles(speeds, n=4)
    spread = (quartiles[2] - quartiles[0]) / 2
    results.add(name, "tokens_per_second", statistics.median(speeds), "tokens/s", better="higher", n=len(speeds), spread=spread)
    for metric in ("peak_allocated_gib", "reserved_gib", "rss_gib"):
        values = [getattr(step, metric) for step in steps]
        if values[-1] is not None:
            results.add(name, metric, max(values), "GiB", better="lower")


if __name__ == "__main__":
    main()
