"""How fast the engine trains, tier by tier: `python -m benchmarks.train --cases llama2-7b/qlora/all/short --models DIR` on a GPU.

A case is shape/method/targets/documents. Every tier of it is one training child as a worker starts it, so a step's time is what
the job's own events say: from its rows to its weights. Short documents have some 130 tokens (log-normal), long ones some 2,048;
the share that is prompt, and carries no loss, is uniform over 0.3 to 0.7. All documents of a step are in memory at once on the
packed and fused tiers, and by nines on the plain one. Speed is the median over the steps after the fifth, of all real tokens;
then the same tier trains one step's documents again and again, and the loss must fall. A tier that fails takes no other's rows
with it. `--profile` leaves a text of where a step's time goes in results/profiles.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import Rows, rows_of, said, short_lengths, train
from benchmarks.results import FOLDER, ROOT, Results
from benchmarks.shapes import made
from core.catalog import Tier
from core.run import RUN_FILE
from core.spec import JobSpec
from tests.core.train.runs import run_input, write_cache

WARM_UP = 5
TIMED = 30
REPEATED = 12
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


class NoMeasurementError(Exception):
    """A child did something else than what was to be measured, or ended early; the message has its words and its log's end."""


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
    parser.add_argument("--repeated", default=",".join(TIERS), help="tiers that train the repeated documents too")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="no tier of a case is begun after that")
    parser.add_argument("--profile", action="store_true", help="profile a few steps of each tier too, in a process of its own")
    parser.add_argument("--models", type=Path, help="where model folders are made, or stand already")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    arguments = parser.parse_args()
    failed, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="strop-train-") as temporary:
        work = Path(temporary)
        for case in arguments.cases.split(","):
            model = (arguments.models or work) / case.split("/")[0]
            results = Results("train", made(case.split("/")[0], model), folder=arguments.out, commit=arguments.commit)
            for tier in arguments.tiers.split(","):
                folder = work / case.replace("/", "-") / tier
                if time.monotonic() - began > arguments.limit_seconds:
                    failed.append(f"{case} on {tier}: not begun, {arguments.limit_seconds:.0f} s are over")
                    continue
                try:
                    failed += _measure(results, case, tier, model, folder)
                    if tier in arguments.repeated.split(","):
                        failed += _repeat(results, case, tier, model, folder)
                    if arguments.profile:
                        failed += _profile(results, case, tier, model, folder)
                    print(f"{time.monotonic() - began:.0f} s after the beginning", flush=True)
                except NoMeasurementError as error:
                    failed.append(f"{case} on {tier}: {error}")
                except Exception as error:
                    traceback.print_exc()
                    failed.append(f"{case} on {tier}: {type(error).__name__}: {error}")
    if failed:
        sys.exit("; ".join(failed))


def _measure(results: Results, name: str, tier: Tier, model: Path, folder: Path) -> list[str]:
    """Add the rows of one tier; what is wrong with them, in words. Raises NoMeasurementError."""
    case, length = CASES[name], name.split("/")[3].split("-")[0]
    rows = documents(case.rows * (WARM_UP + TIMED), length)
    events, log = train(model, write_cache(folder / "tokens", rows), spec_of(name, tier, WARM_UP + TIMED), folder / "run")
    steps = [event for event in events if event.kind == "step"]
    started = [event for event in events if event.kind == "started"]
    if len(steps) < WARM_UP + TIMED or started[0].tier != tier:
        raise NoMeasurementError(f"{'; '.join(said(events))}\n{log[-2000:]}")
    print(json.dumps({"case": name, "tier": tier, "said": said(events)}), flush=True)
    problems = [f"{name} on {tier}: step {step.step} has no gradient" for step in steps if not step.grad_norm > 0]
    timed = steps[WARM_UP:]
    speeds = [step.tokens_per_second for step in timed]
    quartiles = statistics.quantiles(speeds, n=4)
    spread = (quartiles[2] - quartiles[0]) / 2
    row, n = f"{name}/{tier}", len(speeds)
    is_judged = tier == "fused"
    results.add(
        row,
        "tokens_per_second",
        statistics.median(speeds),
        "tokens/s",
        better="higher",
        n=n,
        spread=spread,
        must=case.must if is_judged else None,
        aim=case.aim if is_judged else None,
    )
    results.add(row, "tokens_per_step", statistics.mean(step.tokens for step in timed), "tokens", better="higher", n=n)
    peaks = [step.peak_allocated_gib for step in steps if step.peak_allocated_gib is not None]
    if peaks:
        results.add(row, "peak_allocated_gib", max(peaks), "GiB", better="lower", must=case.gib if is_judged else None)
    return problems


def _repeat(results: Results, name: str, tier: Tier, model: Path, folder: Path) -> list[str]:
    """Add what the loss of one step's documents falls by when they are trained again and again; what is wrong with that.

    Raises NoMeasurementError.
    """
    repeated = write_cache(folder / "repeated", documents(CASES[name].rows, name.split("/")[3].split("-")[0]))
    again, log = train(model, repeated, spec_of(name, tier, REPEATED), folder / "again")
    losses = [event.loss for event in again if event.kind == "step"]
    if len(losses) < REPEATED:
        raise NoMeasurementError(f"repeated documents: {'; '.join(said(again))}\n{log[-2000:]}")
    fall = losses[0] - losses[-1]
    results.add(f"{name}/{tier}", "loss_fall_on_repeated_documents", fall, "nats", better="higher", n=REPEATED)
    if not fall > 0:
        return [f"{name} on {tier}: the loss of repeated documents went from {losses[0]:.4f} to {losses[-1]:.4f}"]
    return []


def _profile(results: Results, name: str, tier: Tier, model: Path, folder: Path) -> list[str]:
    """Leave a profile of a few steps over the documents that were measured; what went wrong, in words."""
    run_dir = folder / "profile"
    run_dir.mkdir()
    run = run_input(model, folder / "tokens", spec_of(name, tier, WARM_UP + TIMED)).model_copy(update={"device": "auto"})
    (run_dir / RUN_FILE).write_text(run.model_dump_json())
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.profile", str(run_dir), str(WARM_UP)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.stdout:
        print(f"profile: {results.text(f'{name}/{tier}'.replace('/', '-'), done.stdout)}", flush=True)
    return [f"profile of {name} on {tier}: {done.stderr[-2000:]}"] if done.returncode != 0 else []


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
