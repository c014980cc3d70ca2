"""Do the engine's settings learn the same? `python -m benchmarks.quality --model FOLDER --data FILE --cases plain-s0,packed-s0`

Trains the same rows in the same order by the training child alone, without the service, and compares the loss on the same
held-out rows. A case is `<setting>-s<seed>`: `plain` pads every row of a step, `packed` lays the rows end to end; `fused` and
`fp8` are packed rows in fused layers, with weights as they are and in 8-bit floats; `default` and `guide-qlora` are strop's own
choice and the guide's. The seed decides the held-out rows, their order and the adapter's first weights. Each case leaves its
rows and its whole curve before the next one begins; where `plain` and `packed` of a seed, or `fused` and `fp8`, stand in the
same folder, from this call or an earlier one, their distance is a row too.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.results import FOLDER, ROOT, Results
from benchmarks.shapes import device_name
from core.events import ChildEvent, Evaluation, Started, Step, Warned, parse_child_event
from core.manifest import file_sha256
from core.model_folder import read_model_facts
from core.prepare import prepare_rows, prepare_tokens
from core.run import LOG_FILE, ROWS_FILE, RUN_FILE, TOKENS_FOLDER, RunInput, TokenCacheRef, TokenizeInput, ValidateInput
from core.spec import JobSpec

Device = Literal["auto", "cpu", "cuda"]
DATASET = "ds_quality00"
DEFAULT_LENGTH = 512
EVAL_ROWS = 64
GAP_AT_MOST = 0.02
DROP_AT_LEAST = 0.1
_TIER: dict[str, Any] = {
    # Some 490 tokens a step of data/text/alpaca_en.json.
    "data": {"max_length": 256},
    "optim": {"learning_rate": 5e-4},
    "schedule": {"warmup_steps": 10},
}
_FUSED = _TIER | {"batch": {"micro_batch_size": 3, "packing": "on"}, "memory": {"fused_layers": True}}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": _TIER | {"batch": {"micro_batch_size": 3, "packing": "off"}},
    "packed": _TIER | {"batch": {"micro_batch_size": 3, "packing": "on"}},
    "fused": _FUSED,
    "fp8": _FUSED | {"quantization": {"kind": "fp8"}},
    "default": {},
    "guide-qlora": {"preset": "guide-qlora"},
}

_TIERS = {"plain": "plain", "packed": "packed", "fused": "fused", "fp8": "fused"}
_GAPS = {("plain", "packed"): GAP_AT_MOST, ("fused", "fp8"): None}
"""Settings of which the second should learn what the first does -> how far apart their ends may be, where that is promised."""


@dataclass(frozen=True)
class Material:
    """A model and a dataset, ready to be trained."""

    model: Path
    weights: str
    data: Path
    rows: Path  # rows.jsonl: the conversations
    tokens: Path  # the token cache, rows cut at `max_length`
    max_length: int


@dataclass(frozen=True)
class Learned:
    """What one run said of itself."""

    spec: JobSpec
    started: Started
    steps: list[Step]
    evaluations: list[Evaluation]
    warnings: list[Warned]

    @property
    def before(self) -> float:
        return self.evaluations[0].eval_loss

    @property
    def after(self) -> float:
        return self.evaluations[-1].eval_loss

    def curve(self) -> dict[str, Any]:
        """The run as JSON: the spec, and one list per quantity over the steps."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "started": self.started.model_dump(mode="json", exclude={"seq", "at", "example"}),
            "warnings": [warned.code for warned in self.warnings],
            "eval_step": [evaluation.step for evaluation in self.evaluations],
            "eval_loss": [round(evaluation.eval_loss, 6) for evaluation in self.evaluations],
            "loss": [round(step.loss, 6) for step in self.steps],
            "grad_norm": [round(step.grad_norm, 6) for step in self.steps],
            "learning_rate": [float(f"{step.learning_rate:.6g}") for step in self.steps],
            "tokens": [step.tokens for step in self.steps],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--cases", default="plain-s0,packed-s0", help=f"<setting>-s<seed>, settings: {', '.join(SETTINGS)}")
    parser.add_argument("--steps", type=int, help="optimizer steps of a case (default: --epochs)")
    parser.add_argument("--epochs", type=float, help="passes over the data (default: the setting's)")
    parser.add_argument("--rows-per-step", type=int, help="rows of a step, all at once (default: the setting's)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    cases = {case: _setting_and_seed(case) for case in arguments.cases.split(",")}
    results = Results("quality", device_name(arguments.device), folder=arguments.out, commit=arguments.commit)
    losses: dict[str, tuple[float, float]] = {}
    schedule = {"max_steps": arguments.steps, "epochs": arguments.epochs}
    asked: dict[str, Any] = {
        "schedule": {name: value for name, value in schedule.items() if value is not None},
        "eval": {"every_steps": 25},
    }
    if arguments.rows_per_step is not None:
        asked["batch"] = {"micro_batch_size": arguments.rows_per_step, "gradient_accumulation_steps": 1}
    with tempfile.TemporaryDirectory(prefix="strop-quality-") as folder:
        for case, (setting, seed) in cases.items():
            work = Path(folder) / case
            wanted = SETTINGS[setting]
            max_length = wanted.get("data", {}).get("max_length", DEFAULT_LENGTH)
            material = prepare(arguments.model, arguments.data, work / "material", max_length)
            learned = run(material, spec_of(material, wanted, asked, {"seed": seed}), work / "run", arguments.device)
            _assert_tier(setting, learned)
            losses[case] = learned.before, learned.after
            keep(results, case, material, learned)
            _keep_gap(results, seed)
    print(f"\n{'case':24} {'before':>8} {'after':>8} {'fall':>8}")
    for case, (before, after) in losses.items():
        print(f"{case:24} {before:8.4f} {after:8.4f} {before - after:8.4f}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="a dataset as it would be uploaded")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result files")
    parser.add_argument("--commit", help="of the tree, where git can't say")


def prepare(model: Path, data: Path, folder: Path, max_length: int) -> Material:
    """Validate, render and tokenise as the preparer does. Raises what it raises."""
    folder.mkdir(parents=True)
    prepare_rows(ValidateInput(upload=data, filename=data.name), folder)
    facts = read_model_facts(model)
    request = TokenizeInput(
        dataset_id=DATASET,
        rows=folder / ROWS_FILE,
        model_folder=model,
        template="model",
        max_length=max_length,
        train_on="all_turns",
    )
    prepare_tokens(request, folder)
    return Material(
        model=model.resolve(),
        weights=facts.weights,
        data=data,
        rows=folder / ROWS_FILE,
        tokens=folder / TOKENS_FOLDER,
        max_length=max_length,
    )


def spec_of(material: Material, *parts: dict[str, Any]) -> JobSpec:
    """strop's defaults, overridden by one part after the other, field by field; no checkpoint but the end."""
    fields: dict[str, Any] = {
        "base_model": material.model.name,
        "data": {"datasets": [{"dataset_id": DATASET}], "max_length": material.max_length, "eval_rows": EVAL_ROWS},
        "checkpoints": {"every_steps": None},
    }
    for part in parts:
        for name, value in part.items():
            fields[name] = fields.get(name, {}) | value if isinstance(value, dict) else value
    return JobSpec.model_validate(fields)


def run_input(material: Material, spec: JobSpec, device: Device) -> RunInput:
    return RunInput(
        job_id="job_quality",
        attempt=1,
        spec=spec,
        model_folder=material.model,
        model_weights=material.weights,
        token_caches=[TokenCacheRef(dataset_id=DATASET, folder=material.tokens, weight=1.0)],
        resume_from=None,
        device=device,
    )


def run(material: Material, spec: JobSpec, run_dir: Path, device: Device) -> Learned:
    """Train to the end, in a child as the supervisor starts it: kernels swapped into one run never reach the next."""
    run_dir.mkdir(parents=True)
    (run_dir / RUN_FILE).write_text(run_input(material, spec, device).model_dump_json())
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "core.train", str(run_dir), "--events-fd", str(writing)]
    found: dict[str, list[Any]] = defaultdict(list)
    with (
        (run_dir / LOG_FILE).open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writing], cwd=ROOT) as child,
        os.fdopen(reading, "rb") as events,
    ):
        os.close(writing)
        for line in events:
            event = parse_child_event(line)
            found[event.kind].append(event)
            _show(event)
    if child.returncode != 0:
        message = found["ended"][-1].message if found["ended"] else "the child died"
        sys.exit(f"{message}\n{(run_dir / LOG_FILE).read_text()[-4000:]}")
    return Learned(spec, found["started"][0], found["step"], found["eval"], found["warning"])


def _show(event: ChildEvent) -> None:
    if event.kind == "step" and event.step % 10 == 0:
        print(f"step {event.step} loss {event.loss:.4f} {event.tokens_per_second:.0f} tokens/s", file=sys.stderr)
    elif event.kind == "eval":
        print(f"step {event.step} held-out loss {event.eval_loss:.4f}", file=sys.stderr)
    elif event.kind == "warning":
        print(f"{event.code}: {event.message}", file=sys.stderr)


def keep(results: Results, case: str, material: Material, learned: Learned) -> None:
    """The rows and the curve of one run."""
    origin = {"model": material.model.name, "weights": material.weights}
    origin |= {"data": material.data.name, "data_sha256": file_sha256(material.data)}
    results.curve(case, origin | learned.curve())
    drop = learned.before - learned.after
    results.add(case, "eval_loss_before", learned.before, "nats", better="lower", n=EVAL_ROWS)
    results.add(case, "eval_loss", learned.after, "nats", better="lower", n=EVAL_ROWS)
    results.add(case, "eval_loss_drop", drop, "nats", better="higher", must=DROP_AT_LEAST, n=EVAL_ROWS)
    # The first steps pay for warm-up.
    speeds = [step.tokens_per_second for step in learned.steps[3:]] or [learned.steps[-1].tokens_per_second]
    results.add(case, "tokens_per_second", statistics.median(speeds), "tokens/s", better="higher", n=len(speeds))
    peaks = [step.peak_allocated_gib for step in learned.steps if step.peak_allocated_gib is not None]
    if peaks:
        results.add(case, "peak_allocated_gib", max(peaks), "GiB", better="lower")


def _keep_gap(results: Results, seed: int) -> None:
    for (one, other), must in _GAPS.items():
        paths = [results.curve_path(f"{setting}-s{seed}") for setting in (one, other)]
        if all(path.exists() for path in paths):
            ends = [json.loads(path.read_text())["eval_loss"][-1] for path in paths]
            gap = abs(ends[0] - ends[1])
            results.add(f"{one}-{other}-s{seed}", "eval_loss_gap", gap, "nats", better="lower", must=must, n=EVAL_ROWS)


def _assert_tier(setting: str, learned: Learned) -> None:
    tier = learned.started.tier
    if tier != _TIERS.get(setting, tier):
        sys.exit(f"a {setting} case ran on the {tier} tier, and its numbers are not kept: {learned.started.tier_reason}")


def _setting_and_seed(case: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.+)-s(\d+)", case)
    if not found or found[1] not in SETTINGS:
        sys.exit(f"--cases: {case!r} is not <setting>-s<seed> with a setting of {', '.join(SETTINGS)}")
    return found[1], int(found[2])


if __name__ == "__main__":
    main()
