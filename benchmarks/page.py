"""docs/performance.md, made of benchmarks/results/*.json: `python -m benchmarks.page` writes it.

A target without a row is said to be not measured, and a must that a row misses is said to be missed. A test holds the committed
page to what this makes, so that new results and their page are one commit.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import serve, vision
from benchmarks.results import FOLDER, ROOT
from benchmarks.service import READY_AIM, READY_MUST, SHARE_AIM, SHARE_MUST
from benchmarks.train import CASES, TIERS

PAGE = ROOT / "docs" / "performance.md"
Row = dict[str, Any]
"""As benchmarks.results.Results.add stores it."""

INTRO = """# Performance

Made by `python -m benchmarks.page` from `benchmarks/results/*.json`; change those, not this page. Every number names the run that
measured it: command, commit, date and device stand at the end. A must is what the project promised itself for one H100 80GB, an
aim what it would like. Spread, or ±, is half the distance of the quartiles over n repetitions.
"""


@dataclass(frozen=True)
class Subject:
    """One benchmark, as the page shows it."""

    title: str
    words: str
    shown: tuple[str, ...] = ()
    """Metrics of the table that has a column for each; empty is all that nothing was promised of."""


SUBJECTS: dict[str, Subject] = {
    "train": Subject(
        "Training",
        "`benchmarks/train.py`: a training child as a worker starts it, alone on the device, real tokens a second over a step "
        "from its rows to its weights, median of 30 steps; rank 16 on all linear modules, no activations kept between steps. The "
        "fused tier is judged. Commands recorded at commit ecac34a name only the end of their last case; the rows name what ran.",
        ("tokens_per_second", "peak_allocated_gib", "loss_fall_on_repeated_documents"),
    ),
    "service": Subject(
        "Service",
        "`benchmarks/service.py`: the same case through REST, Celery and child, an event every step and a checkpoint every 100, "
        "over the wall time from first to last step; `share_of_bare` is its speed over that of the child alone. Ready is job "
        "claimed to first step, compile caches warm.",
    ),
    "serve": Subject(
        "Serving",
        "`benchmarks/serve.py`: requests of random tokens on the inference engine, 128 in and 128 out, adapters of rank 16 on "
        "all linear modules, output tokens from first submission to last finish, median of waves. `cpu-135m/8-clients` is fp32 "
        "on two shared cores, 64 in and 64 out, the best of several turns of each side. Adapters on disk are in the page cache.",
    ),
    "vision": Subject(
        "Vision",
        "`benchmarks/vision.py`. `jpeg-pipeline` is of one CPU core: made JPEGs of 640 x 480 and 160 KB out of shards, "
        "decoded and brought to 224 x 224, over the CPU seconds of the process; plain is tarfile, Pillow and transformers' "
        "processor on the same shards; cached is what an epoch reads of the same pictures, prepared.",
    ),
    "plan": Subject("Plan", "`benchmarks/plan.py`: what the plan said before, and what a run took."),
    "memory": Subject(
        "Memory",
        "`benchmarks/memory.py`: each lever of memory, 32 rows a step; [memory.md](memory.md) says what they mean.",
        ("planned_gib", "peak_allocated_gib", "tokens_per_second"),
    ),
    "quality": Subject(
        "Quality",
        "`benchmarks/quality.py`: what the engine's settings learn of the same rows, seed by seed.",
        ("eval_loss_before", "eval_loss", "tokens_per_second"),
    ),
    "peer": Subject(
        "Beside TRL",
        "`benchmarks/peer`: the same rows in the same order through TRL's SFTTrainer.",
        ("eval_loss", "first_step_loss_gap", "largest_step_loss_gap", "largest_grad_norm_gap"),
    ),
    "walk": Subject(
        "The walk of a job",
        "`benchmarks/walk.py`: a job from upload to answer through the whole service.",
        ("submitted_to_first_step_seconds", "ended_to_routable_seconds", "whole_walk_seconds", "tokens_per_second"),
    ),
}


@dataclass(frozen=True)
class Target:
    benchmark: str
    case: str
    tier: str
    metric: str
    unit: str
    must: float
    aim: float | None = None

    @property
    def row_case(self) -> str:
        return f"{self.case}/{self.tier}" if self.tier else self.case


def targets() -> list[Target]:
    """All that was promised for one H100 (`cpu-135m`: for two cores)."""
    found = []
    for name, case in CASES.items():
        if case.must is not None:
            found.append(Target("train", name, "fused", "tokens_per_second", "tokens/s", case.must, case.aim))
        if case.gib is not None:
            found.append(Target("train", name, "fused", "peak_allocated_gib", "GiB", case.gib))
    found.append(Target("service", "service/llama-1.1b/lora/all/short", "", "share_of_bare", "", SHARE_MUST, SHARE_AIM))
    found.append(Target("service", "ready/llama-1.1b", "", "claimed_to_first_step_seconds", "s", READY_MUST, READY_AIM))
    found += [Target("serve", name, "", metric, "", must, aim) for name, (metric, must, aim) in serve.TARGETS.items()]
    found += [Target("vision", name, "", metric, "samples/s", must, aim) for name, (metric, must, aim) in vision.TARGETS.items()]
    return found


PEERS_SOURCE = "measured on the same kind of GPU, 2026-11-24"
PEERS: dict[str, tuple[str, str]] = {
    "llama-1.1b/lora/all/short": ("75.0k, 21.4 GiB", "82.8k, 24.6 GiB"),
    "llama-1.1b/full/-/short": ("", "74.3k (packed)"),
    "llama2-7b/lora/all/short": ("17.1k, 40.5 GiB", "18.0k, 50.1 GiB"),
    "llama2-7b/qlora/all/short": ("16.7k, 31.6 GiB", "17.4k, 41.2 GiB"),
    "llama2-7b/qlora/all/short-ckpt": ("11.2k, 5.7 GiB", "11.8k, 7.9 GiB"),
    "qwen3-8b/qlora/all/short": ("", "15.5k"),
    "llama-1.1b/lora/all/short-8docs": ("11.0k (its better path)", "72.6k (q and v only)"),
    "llama2-7b/qlora/all/short-8docs": ("6.6k (its better path)", "11.1k"),
    "llama-1.1b/lora/all/long": ("", "63k"),
    "llama2-7b/qlora/all/long": ("", "13.2k"),
    "llama2-7b/fp8lora/all/short": ("", "24.5k"),
}
"""Case -> (Unsloth 2026.10.9, the prototype that this engine came from): tokens/s, peak memory."""
SERVING_PEERS: dict[str, tuple[str, str]] = {
    "8b/base/c32": ("1,146", "4,048"),
    "8b/8-adapters/c32": ("74", "2,620"),
    "8b/8-adapters/c128": ("", "6,938"),
    "1.1b/8-adapters/c32": ("", "7,841"),
    "8b/8-adapters/c1": ("18.4", "119.5"),
    "8b/retention-1": ("0.47", "0.81"),
    "8b/retention-8": ("", "0.65"),
}
"""Case -> (transformers 5.17.0 with peft 0.21.2, vLLM 0.25.1): output tokens/s, or the share of the bare base's."""


class Runs:
    """The runs that rows name, numbered as they come up."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, ...], int] = {}

    def cite(self, rows: list[Row]) -> str:
        keys = dict.fromkeys(tuple(str(row[name]) for name in ("command", "commit", "date", "device")) for row in rows)
        return ", ".join(str(self._numbers.setdefault(key, len(self._numbers) + 1)) for key in keys)

    def table(self) -> list[str]:
        cells = [[str(number), f"`{command}`", *rest] for (command, *rest), number in self._numbers.items()]
        return _table(["run", "command", "commit", "date", "device"], cells)


def page(folder: Path = FOLDER) -> str:
    """The whole text; `folder` holds result files."""
    files: dict[str, list[Row]] = {name: [] for name in SUBJECTS}
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text())
        files.setdefault(stored["benchmark"], []).extend(stored["rows"])
    runs = Runs()
    lines = [INTRO]
    for name, rows in files.items():
        wanted = [target for target in targets() if target.benchmark == name]
        if not rows and not wanted:
            continue
        subject = SUBJECTS.get(name, Subject(name.capitalize(), f"`benchmarks/{name}.py`."))
        lines += [f"## {subject.title}", "", subject.words, ""]
        lines += _judged(rows, wanted, runs)
        if name == "train":
            lines += _peers(PEERS, "Unsloth 2026.10.9", "prototype")
        if name == "serve":
            lines += _peers(SERVING_PEERS, "transformers 5.17.0, peft 0.21.2", "vLLM 0.25.1")
        lines += _others(rows, subject, runs)
    return "\n".join([*lines, "## Runs", "", *runs.table()])


def verdict(row: Row) -> str:
    """What a row's value is to its must and aim."""

    def reaches(mark: float | None) -> bool:
        if mark is None:
            return False
        return bool(row["value"] >= mark if row["better"] == "higher" else row["value"] <= mark)

    if reaches(row["aim"]):
        return "met, and the aim"
    return "met" if row["must"] is None or reaches(row["must"]) else "**missed**"


def _judged(rows: list[Row], wanted: list[Target], runs: Runs) -> list[str]:
    """Rows with a must or an aim, those of the targets first and in their order."""
    judged = [row for row in rows if row["must"] is not None or row["aim"] is not None]
    cells = []
    for target in wanted:
        found = [row for row in judged if (row["case"], row["metric"]) == (target.row_case, target.metric)]
        for row in found:
            judged.remove(row)
            cells.append(_judged_cells(row, runs))
        if not found:
            marks = [_number(target.must), _number(target.aim)]
            what = [f"`{target.case}`", target.tier, "", target.metric, "", target.unit]
            cells.append([*what, *marks, "not measured", "", "", ""])
    cells += [_judged_cells(row, runs) for row in judged]
    head = ["case", "tier", "device", "metric", "value", "unit", "must", "aim", "verdict", "n", "spread", "run"]
    return _table(head, cells)


def _judged_cells(row: Row, runs: Runs) -> list[str]:
    case, tier = _case_and_tier(row)
    numbers = [_number(row["value"]), row["unit"], _number(row["must"]), _number(row["aim"]), verdict(row)]
    return [case, tier, row["device"], row["metric"], *numbers, str(row["n"]), _number(row["spread"]), runs.cite([row])]


def _others(rows: list[Row], subject: Subject, runs: Runs) -> list[str]:
    """A line for a case on a device, a column for a metric."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    units: dict[str, str] = dict.fromkeys(subject.shown, "")
    for row in rows:
        is_promised = row["must"] is not None or row["aim"] is not None
        if row["metric"] in subject.shown or not (subject.shown or is_promised):
            lines.setdefault((row["device"], row["case"]), {})[row["metric"]] = row
            units[row["metric"]] = row["unit"]
    cells = []
    for (device, _), line in sorted(lines.items()):
        case, tier = _case_and_tier(next(iter(line.values())))
        cells.append([case, tier, device, *(_measured(line.get(metric)) for metric in units), runs.cite(list(line.values()))])
    return _table(["case", "tier", "device", *(_headed(metric, unit) for metric, unit in units.items()), "run"], cells)


def _peers(peers: dict[str, tuple[str, str]], *names: str) -> list[str]:
    cells = [[f"`{case}`", *figures] for case, figures in peers.items()]
    return [f"Others at the same work, {PEERS_SOURCE}:", "", *_table(["case", *names], cells)]


def _case_and_tier(row: Row) -> tuple[str, str]:
    case, _, last = row["case"].rpartition("/")
    return (f"`{case}`", last) if case.count("/") == 3 and last in TIERS else (f"`{row['case']}`", "")


def _measured(row: Row | None) -> str:
    """A value, and what it may be off by where it was measured more than once."""
    if row is None:
        return ""
    return _number(row["value"]) + ("" if row["spread"] is None else f" ± {_number(row['spread'])}")


def _headed(metric: str, unit: str) -> str:
    says_unit = not unit or metric.endswith(("_seconds", "_gib", "_per_second"))
    return metric if says_unit else f"{metric}, {unit}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """In Markdown, without the columns in which nothing stands; no line where there is no row."""
    if not rows:
        return []
    kept = [number for number in range(len(head)) if any(row[number] for row in rows)]
    lines = [[row[number] for number in kept] for row in [head, ["---"] * len(head), *rows]]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


if __name__ == "__main__":
    PAGE.write_text(page())
