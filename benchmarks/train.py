"""How fast the engine trains, tier by tier: `python -m benchmarks.train --cases llama2-7b/qlora/all/short --models DIR` on a GPU.

A case is shape/method/targets/documents. Every tier of it is one training child as a worker starts it, so a step's time is what
the job's own events say: from its rows to its weights. Short documents have some 130 tokens (log-normal), long ones some 2,048;
the share that is prompt, and carries no loss, is uniform over 0.3 to 0.7. All documents of a step are in memory at once on the
packed and fused tiers, and by nines on the plain one.

Children are set up side by side and train one by one, each alone on the device (benchmarks/pool.py). A child first trains one
step's documents again and again, and the loss must fall; then a few steps of other documents, so that kernels are there for
every length; then the steps that are timed. Speed is their median, of all real tokens; each has documents of its own. A tier
that fails takes no other's rows with it. `--profile` leaves a text of where a step's time goes in results/profiles, from a
process of its own after all else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import Rows, in_training_order, planned_work, rows_of, said, short_lengths
from benchmarks.pool import Outcome, Run, add_arguments, limits, measure_alone, run_of_work
from benchmarks.results import FOLDER, ROOT, Results
from benchmarks.shapes import made_all
from core.catalog import Tier
from core.run import RUN_FILE
from core.spec import JobSpec
from tests.core.train.runs import run_input, write_cache

REPEATED = 12
WARM_UP = 20
"""By then most sizes of a step have come by, each of which is recorded once (core.train.fused.graphs)."""
TIMED = 30
_PLAIN_ROWS = 9
_QUANTIZATION = {"qlora": "nf4", "fp8lora": "fp8"}
_LONGEST = {"short": 512, "long": 4096}


@dataclass(frozen=True)
class Case:
    rows: int
    """Documents of a step."""
    must: float | None = None
    aim: float | None = None
    """Tokens a second on one H100 80GB, of the best tier."""
    gib: float | None = None
    """Most that may be allocated at once."""


CASES = {
    "tiny/lora/all/short": Case(18),
    "llama-1.1b/lora/all/short": Case(126, 88_000, 100_000, 21),
    "llama-1.1b/full/-/short": Case(126, 76_000, 90_000),
    "llama2-7b/lora/all/short": Case(63, 18_800, 20_500, 40),
    "llama2-7b/qlora/all/short": Case(63, 18_200, 20_000, 31),
    "llama2-7b/qlora/all/short-ckpt": Case(63, 12_000, 13_500, 5.7),
    "qwen3-8b/qlora/all/short": Case(63, 16_000, 17_500),
    "llama-1.1b/lora/all/short-8docs": Case(8, 55_000, 80_000),
    "llama2-7b/qlora/all/short-8docs": Case(8, 11_000, 14_000),
    "llama-1.1b/lora/all/long": Case(8, 66_000, 80_000),
    "llama2-7b/qlora/all/long": Case(4, 14_000, 16_000),
    "llama2-7b/fp8lora/all/short": Case(63, 24_000, 27_000),
}
TIERS: tuple[Tier, ...] = ("plain", "packed", "fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--tiers", default=",".join(TIERS))
    parser.add_argument("--timed", type=int, default=TIMED, help="steps of a median; fewer are allowed where only plain is timed")
    parser.add_argument("--profile", action="store_true", help="profile a few steps of each tier too, in a process of its own")
    parser.add_argument("--models", type=Path, help="where model folders are made, or stand already")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    add_arguments(parser)
    arguments, began = parser.parse_args(), time.monotonic()
    cases, tiers = arguments.cases.split(","), arguments.tiers.split(",")
    if arguments.timed < TIMED and tiers != ["plain"]:
        parser.error(f"--timed {arguments.timed}: what is judged is timed over {TIMED} steps; ask for --tiers plain alone")
    with tempfile.TemporaryDirectory(prefix="strop-train-") as temporary:
        work = Path(temporary)
        models = arguments.models or work
        device = made_all((case.split("/")[0] for case in cases), models)
        results = Results("train", device, folder=arguments.out, commit=arguments.commit)
        runs = [run_of(case, tier, arguments.timed, models, work) for case in cases for tier in tiers]
        failed = []
        for outcome in measure_alone(runs, **limits(arguments, began)):
            failed += _add(results, outcome)
            print(f"{time.monotonic() - began:.0f} s after the beginning", flush=True)
        for run in runs if arguments.profile else ():
            if time.monotonic() - began > arguments.limit_seconds:
                failed.append(f"profile of {run.name}: not begun, {arguments.limit_seconds:.0f} s are over")
            else:
                failed += _profile(results, run)
    if failed:
        sys.exit("; ".join(failed))


def run_of(name: str, tier: Tier, timed: int, models: Path, work: Path) -> Run:
    """The child of a tier of a case; its rows are written below `work`."""
    shape, _, _, how = name.split("/")
    steps = REPEATED + WARM_UP + timed
    rows = CASES[name].rows
    distinct = documents(rows * (steps - REPEATED + 1), how.split("-")[0])
    trained = [*distinct[:rows] * REPEATED, *distinct[rows:]]
    model, folder = models / shape, work / name.replace("/", "-") / tier
    spec = spec_of(name, tier, steps)
    cache = write_cache(folder / "tokens", in_training_order(trained, spec))
    planned = planned_work(shape, model, spec, trained, steps)
    run_dir, warm_up = folder / "run", REPEATED + WARM_UP
    return run_of_work(planned, name=f"{name}/{tier}", model=model, cache=cache, folder=run_dir, warm_up=warm_up)


def _add(results: Results, outcome: Outcome) -> list[str]:
    """Add the rows of one tier; what is wrong with them, in words."""
    row = outcome.run.name
    name, _, tier = row.rpartition("/")
    if outcome.trouble:
        return [f"{name} on {tier}: {outcome.trouble}"]
    case = CASES[name]
    steps = outcome.steps
    started = next(event for event in outcome.events if event.kind == "started")
    repeated = steps[:REPEATED]
    print(json.dumps({"case": name, "tier": tier, "said": said(outcome.events)}), flush=True)
    if started.tier != tier:
        return [f"{name} on {tier}: {'; '.join(said(outcome.events))}"]
    if {step.tokens for step in repeated} != {steps[0].tokens}:
        return [f"{name} on {tier}: the first {REPEATED} steps did not train the same documents"]
    problems = [f"{name} on {tier}: step {step.step} has no gradient" for step in steps[REPEATED:] if not step.grad_norm > 0]
    speeds = [step.tokens_per_second for step in outcome.timed]
    quartiles = statistics.quantiles(speeds, n=4)
    n = len(speeds)
    is_judged = tier == "fused"
    results.add(
        row,
        "tokens_per_second",
        statistics.median(speeds),
        "tokens/s",
        better="higher",
        n=n,
        spread=(quartiles[2] - quartiles[0]) / 2,
        must=case.must if is_judged else None,
        aim=case.aim if is_judged else None,
    )
    results.add(row, "tokens_per_step", statistics.mean(step.tokens for step in outcome.timed), "tokens", better="higher", n=n)
    peaks = [step.peak_allocated_gib for step in steps if step.peak_allocated_gib is not None]
    if peaks:
        results.add(row, "peak_allocated_gib", max(peaks), "GiB", better="lower", must=case.gib if is_judged else None)
    first, last = repeated[0].loss, repeated[-1].loss
    results.add(row, "loss_fall_on_repeated_documents", first - last, "nats", better="higher", n=REPEATED)
    if not last < first:
        problems.append(f"{name} on {tier}: the loss of repeated documents went from {first:.4f} to {last:.4f}")
    return problems


def _profile(results: Results, run: Run) -> list[str]:
    """Leave a profile of a few of the timed steps' documents; what went wrong, in words."""
    run_dir = run.folder.with_name("profile")
    run_dir.mkdir(parents=True)
    asked = run_input(run.model, run.cache, run.spec).model_copy(update={"device": "auto"})
    (run_dir / RUN_FILE).write_text(asked.model_dump_json())
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.profile", str(run_dir), str(run.warm_up)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.stdout:
        print(f"profile: {results.text(run.name.replace('/', '-'), done.stdout)}", flush=True)
    return [f"profile of {run.name}: {done.stderr[-2000:]}"] if done.returncode != 0 else []


def documents(count: int, length: str) -> Rows:
    """(ids, mask), the same at every call."""
    rng = np.random.default_rng(0)
    if length == "short":
        return rows_of(rng, short_lengths(rng, count, _LONGEST["short"]))
    lengths = rng.lognormal(np.log(2048) - 0.5 * 0.25**2, 0.25, count)
    return rows_of(rng, np.clip(lengths, 1024, _LONGEST["long"]).astype(int))


def spec_of(name: str, tier: Tier, steps: int) -> JobSpec:
    _, method, _, how = name.split("/")
    case, length = CASES[name], how.split("-")[0]
    by = case.rows if tier != "plain" or case.rows < _PLAIN_ROWS else _PLAIN_ROWS
    # Unsloth, whose figures stand beside, sends what it keeps to the host too; on the other tiers that is slow.
    is_checkpointed = how.endswith("ckpt")
    memory: dict[str, Any] = {
        "fused_layers": tier == "fused",
        "checkpointing": is_checkpointed,
        "checkpointing_offload": is_checkpointed and tier == "fused",
    }
    return JobSpec.model_validate(
        {
            "base_model": "bench/model",
            "data": {"datasets": [{"dataset_id": "ds_00000000"}], "max_length": min(_LONGEST[length], _context(name))},
            "tuning": {"kind": "full"} if method == "full" else {"kind": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0},
            "quantization": {"kind": _QUANTIZATION.get(method, "none")},
            "optim": {"learning_rate": 2e-5 if method == "full" else 1e-3},
            "batch": {
                "micro_batch_size": by,
                "gradient_accumulation_steps": case.rows // by,
                "packing": "off" if tier == "plain" else "on",
            },
            "schedule": {"max_steps": steps, "epochs": float(steps)},
            "memory": memory,
            "checkpoints": {"every_steps": None},
        }
    )


def _context(name: str) -> int:
    return 512 if name.startswith("tiny") else 4096


if __name__ == "__main__":
    main()
