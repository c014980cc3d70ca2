"""strop beside TRL's SFTTrainer: `python -m benchmarks.peer --model FOLDER --data FILE --peer-python ENV/bin/python`.

The same rows in the same order, the same first adapter and hyper-parameters through both, in fp32 on a CPU; TRL in an
environment of its own (`requirements.txt` beside this file). Kept are both curves, both held-out losses and their distance,
per case: `matched` has strop's learning rates, `own_schedule` TRL's own cosine of the same length and warm-up.

Found with TRL 1.16.0, SmolLM2-135M-Instruct and 100 steps (results/peer-*.json, results/curves/peer-*.json):

- `matched`: the 100 losses agree within 4e-5 nats, the gradient norms within 1e-4, the held-out losses within 1e-6.
- `own_schedule` differs in the warm-up alone: of w steps TRL takes step n at (n - 1) / w of the rate and strop at n / w, so
  TRL's first step changes no weight. From step w + 1 on the rates are equal. That is all of the distance there.
- TRL's own `eval_loss` is a mean over batches of rows, not over tokens, so it is another number for the same model.
- From the same conversations (prompt and completion) TRL makes the same ids. It trains one token more in each: the line end
  that the template writes behind the answer's end-of-turn token, which serving never comes to.
- A user of TRL who names nothing else gets (`defaults` in the curves): a rate of 2e-5 that falls linearly without warm-up,
  three epochs of eight rows in random order, bf16 autocast over fp32 weights, checkpointing on, rows cut at 1024 tokens.
  Rows given as `messages` then carry loss on every token, the prompts' too, unless assistant_only_loss is set.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.quality import EVAL_ROWS, Learned, Material, add_arguments, keep, prepare, run, run_input, spec_of
from benchmarks.results import Results
from benchmarks.shapes import device_name
from core.data.rows import read_row
from core.data.tokens import TokenCache
from core.models.adapt import save_lora
from core.spec import JobSpec
from core.train.build import build_training
from core.train.optim import learning_rate_factor

SCRIPT = Path(__file__).parent / "trl_sft.py"
GAP_AT_MOST = 0.02
MAX_LENGTH = 192
"""With four rows a step, some 560 tokens of data/text/alpaca_en.json."""

UNCUT = 8192
SETTING: dict[str, Any] = {
    "tuning": {"kind": "lora", "rank": 8, "alpha": 16.0},
    "optim": {"learning_rate": 5e-4, "weight_decay": 0.01},
    "schedule": {"kind": "cosine", "warmup_steps": 10},
    # Two of two: padding and accumulation both have to be right on both sides.
    "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "packing": "off"},
    "memory": {"precision": "fp32"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--peer-python", type=Path, required=True, help="the Python of TRL's environment")
    parser.add_argument("--cases", default="matched,own_schedule")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="strop-peer-") as folder:
        work = Path(folder)
        material = prepare(arguments.model, arguments.data, work / "material", MAX_LENGTH)
        spec = spec_of(material, SETTING, {"schedule": {"max_steps": arguments.steps}, "seed": arguments.seed})
        hand_over(material, spec, arguments.cases.split(","), work / "peer")
        learned = run(material, spec, work / "strop", "cpu")
        found = run_peer(arguments.peer_python, work / "peer")
    results = Results(
        "peer", device_name("cpu"), folder=arguments.out, commit=arguments.commit, versions={"trl": found["versions"]["trl"]}
    )
    keep(results, "strop", material, learned)
    compare(results, learned, found)


def hand_over(material: Material, spec: JobSpec, cases: list[str], folder: Path) -> None:
    """Write handover.json and adapter/: all that the peer takes over from strop."""
    (folder / "adapter").mkdir(parents=True)
    training = build_training(run_input(material, spec, "cpu"))
    save_lora(training.model, folder / "adapter")
    steps = range(1, training.total_steps + 1)
    batches = [batch for step in steps for batch in training.layout.split(training.rows.step_rows(step))]
    content = {
        "model": str(material.model),
        "cases": cases,
        "steps": training.total_steps,
        "seed": spec.seed,
        "max_length": spec.data.max_length,
        "micro_batch_size": spec.batch.micro_batch_size,
        "gradient_accumulation_steps": spec.batch.gradient_accumulation_steps,
        "optim": spec.optim.model_dump(),
        "schedule": spec.schedule.model_dump(),
        "learning_rates": [
            spec.optim.learning_rate * learning_rate_factor(spec.schedule, step, training.total_steps) for step in steps
        ],
        "train": [_plain(example.sequences[0]) for batch in batches for example in batch],
        "held_out": [_plain(example.sequences[0]) for example in training.rows.eval_rows],
        "all": _all_uncut(material, folder / "uncut"),
    }
    (folder / "handover.json").write_text(json.dumps(content))


def run_peer(python: Path, folder: Path) -> dict[str, Any]:
    """Run trl_sft.py in its own environment and return what it found."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([python, SCRIPT, folder], check=True, env=environment, stdout=sys.stderr)
    found: dict[str, Any] = json.loads((folder / "peer.json").read_text())
    return found


def compare(results: Results, learned: Learned, found: dict[str, Any]) -> None:
    """One row per number that both sides have, and the peer's curves."""
    rows = found["rows"]
    for name, unit in (("other_ids", "rows"), ("trained_only_by_trl", "tokens"), ("trained_only_by_strop", "tokens")):
        results.add("preparation", name, rows[name], unit, better="lower", n=rows["rows"])
    gap = abs(learned.before - found["held_out_before"])
    results.add("untrained", "eval_loss_gap", gap, "nats", better="lower", must=GAP_AT_MOST, n=EVAL_ROWS)
    for case, peer in found["cases"].items():
        steps = peer["steps"]
        results.curve(
            case,
            {"versions": found["versions"], "defaults": found["defaults"], "eval_loss": peer["held_out_after"]}
            | {name: [float(f"{step[name]:.6g}") for step in steps] for name in ("loss", "grad_norm", "learning_rate")},
        )
        gap = abs(learned.after - peer["held_out_after"])
        results.add(case, "eval_loss", peer["held_out_after"], "nats", better="lower", n=EVAL_ROWS)
        results.add(case, "eval_loss_gap", gap, "nats", better="lower", must=GAP_AT_MOST, n=EVAL_ROWS)
        results.add(case, "eval_loss_as_trl_says", peer["held_out_own"], "nats", better="lower", n=EVAL_ROWS)
        apart = [abs(ours.loss - theirs["loss"]) for ours, theirs in zip(learned.steps, steps, strict=True)]
        norms = [abs(o.grad_norm - t["grad_norm"]) / o.grad_norm for o, t in zip(learned.steps, steps, strict=True)]
        results.add(case, "first_step_loss_gap", apart[0], "nats", better="lower")
        results.add(case, "first_step_grad_norm_gap", norms[0], "share", better="lower")
        results.add(case, "largest_step_loss_gap", max(apart), "nats", better="lower", n=len(apart))
        results.add(case, "largest_grad_norm_gap", max(norms), "share", better="lower", n=len(norms))
        results.add(case, "train_seconds", peer["seconds"], "s", better="lower")


def _all_uncut(material: Material, folder: Path) -> list[dict[str, Any]]:
    """Every conversation with the row that strop's renderer makes of it."""
    whole = prepare(material.model, material.data, folder, UNCUT)
    cache = TokenCache.open(whole.tokens)
    with whole.rows.open(encoding="utf-8", newline="\n") as lines:
        conversations: dict[int, Any] = dict(read_row(line) for line in lines)
    found = []
    for index, number in enumerate(cache.row_numbers.tolist()):
        messages = [{"role": message.role, "content": message.content} for message in conversations[number]]
        found.append({"messages": messages, "row": _plain(cache.row(index))})
    return found


def _plain(row: Any) -> list[list[int]]:
    ids, mask = row
    return [ids.tolist(), mask.tolist()]


if __name__ == "__main__":
    main()
