"""Does the plan foretell memory and time? `python -m benchmarks.plan --set judged --models DIR` on a GPU.

Every case is one training child of six steps, as a worker starts it: two steps' rows three times over, so that what a size of
batch costs once falls into the first two. Beside its peak of allocated memory (over everything from load on) and the median time
of its later steps, trained alone on the device (benchmarks/pool.py), stands what the plan said before. The coefficients of
core/plan/coefficients.py are fitted to the cases of FITTING alone (`--fit FILE` prints better ones), frozen by a commit, and then
judged by those of JUDGED: other cases all, and some on a shape, a rank or a length that fitting never saw. `--table FILE` prints
what came out. A run that was cut ends with the `--cases` that are left.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from benchmarks.children import planned_work, said
from benchmarks.plan_cases import FITTING, SETS, STEPS, WARM_UP, Case
from benchmarks.pool import Outcome, add_arguments, in_turn, limits, measure_alone, needed_gib, next_batch, run_of_work
from benchmarks.results import FOLDER, Results
from benchmarks.shapes import SHAPES, made_all
from core.plan.coefficients import GPUS, STANDING, Coefficients, find_gpu
from core.plan.memory import estimate_memory
from core.plan.time import step_seconds
from core.plan.work import Work
from tests.core.train.runs import write_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=SETS)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th case, from the i-th on")
    parser.add_argument("--cases", help="of the set, by their names")
    parser.add_argument("--models", type=Path, help="folder of model folders by shape; what is not there is made there")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    add_arguments(parser)
    parser.add_argument("--fit", type=Path, metavar="FILE", help="print coefficients fitted to a result file's fitting cases")
    parser.add_argument("--foresee", action="store_true", help="print the batches of both sets, and what the plan says they take")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what the standing coefficients say of a result file")
    arguments, began = parser.parse_args(), time.monotonic()
    if arguments.fit:
        fit(measurements(arguments.fit, FITTING))
    if arguments.table:
        for name, cases in SETS.items():
            show_table(name, measurements(arguments.table, cases))
    if arguments.foresee:
        for name in ("fit", "judged"):
            foresee(name, SETS[name], arguments.gib, arguments.at_once)
    if arguments.set:
        number, of = map(int, arguments.part.split("/"))
        chosen = {case.name for case in SETS[arguments.set]} if arguments.cases is None else set(arguments.cases.split(","))
        if unknown := chosen - {case.name for case in SETS[arguments.set]}:
            parser.error(f"--cases: {', '.join(sorted(unknown))} is not in the set {arguments.set}")
        run_all([case for case in SETS[arguments.set][number - 1 :: of] if case.name in chosen], arguments, began)


def in_order(cases: list[Case]) -> list[Case]:
    """Small models first, so that a run that is cut has measured many."""
    return sorted(cases, key=lambda case: list(SHAPES).index(case.shape))


def foresee(name: str, cases: list[Case], gib: float, at_once: int) -> None:
    """Print a set's batches as an H100 would be asked for them; setting children up comes on top."""
    gpu, nowhere = GPUS["H100"], Path()
    works = {case.name: work_of_case(case, None) for case in in_order(cases)}
    waiting = [run_of_work(of, name=n, model=nowhere, cache=nowhere, folder=nowhere, warm_up=WARM_UP) for n, of in works.items()]
    total, batches = 0.0, 0
    while waiting:
        batch = next_batch(waiting, gib, at_once)
        waiting = [run for run in waiting if run not in batch]
        seconds = sum(STEPS * step_seconds(works[run.name], gpu) for run in batch)
        total, batches = total + seconds, batches + 1
        said_of = ", ".join(f"{run.name} {run.peak_gib:.1f} GiB" for run in in_turn(batch))
        print(f"{name} {batches}: {seconds:.0f} s of steps, {needed_gib(batch):.0f} GiB: {said_of}")
    print(f"{name}: {len(cases)} cases in {batches} batches, {total:.0f} s of steps")


def run_all(cases: list[Case], arguments: argparse.Namespace, began: float) -> None:
    """Add the rows of each case as it is measured. Ends the process with the names of those that could not be."""
    failed = []
    with tempfile.TemporaryDirectory(prefix="strop-plan-") as temporary:
        models = arguments.models or Path(temporary)
        device = made_all((case.shape for case in cases), models)
        results = Results("plan", device, folder=arguments.out, commit=arguments.commit)
        known, runs = {}, []
        for case in in_order(cases):
            work = work_of_case(case, models / case.shape)
            place = Path(temporary) / case.name.replace("/", "-")
            cache = write_cache(place / "cache", case.made_rows())
            model, folder = models / case.shape, place / "run"
            known[case.name] = case, work
            runs.append(run_of_work(work, name=case.name, model=model, cache=cache, folder=folder, warm_up=WARM_UP))
        for outcome in measure_alone(runs, **limits(arguments, began)):
            case, work = known[outcome.run.name]
            print(json.dumps({"case": case.name, "planned": work.tier, "said": said(outcome.events)}), flush=True)
            if outcome.trouble:
                print(f"{case.name}: {outcome.trouble}", flush=True)
                failed.append(case.name)
            else:
                _add(results, case, work, device, outcome)
    if failed:
        sys.exit(f"not measured: --cases {','.join(failed)}")


@dataclass(frozen=True)
class Measured:
    """A case, what the plan needs of it, and what it took; None where its device could not tell."""

    case: Case
    work: Work
    gpu: str
    peak_gib: float | None
    seconds: float | None
    is_as_planned: bool
    """It ran on the tier that was planned."""


def measurements(file: Path, cases: list[Case]) -> list[Measured]:
    """Those of the cases that stand in a result file."""
    rows = json.loads(file.read_text())["rows"]
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["metric"]] = row["value"]
    gpu = rows[0]["device"]
    return [
        Measured(
            case,
            work_of_case(case, None),
            gpu,
            found[case.name].get("peak_allocated_gib"),
            found[case.name].get("step_seconds"),
            found[case.name].get("tier_as_planned") == 1,
        )
        for case in cases
        if case.name in found and case.shape != "tiny"
    ]


def work_of_case(case: Case, model: Path | None) -> Work:
    return planned_work(case.shape, model, case.spec(), case.made_rows(), STEPS)


def fit(measured: list[Measured]) -> None:
    """Print the coefficients that lie nearest to the measurements, memory and time apart."""
    known = [m for m in measured if m.is_as_planned]
    tiers = {m.work.tier for m in known}
    memory = ["fixed_gib", "passing", *(f"kept_{tier}" for tier in sorted(tiers))]
    time = ["matmul_share", "traffic_adapter", "layer_seconds", "adapter_seconds", "step_seconds"]
    time += [f"traffic_{tier}" for tier in sorted(tiers)] + (["fused_share"] if "fused" in tiers else [])
    best = nearest(STANDING, memory, lambda k: _errors(known, k, "memory"))
    best = nearest(best, time, lambda k: _errors(known, k, "time"))
    print(f"fitted to {len(known)} of {len(measured)} cases (the others ran on another tier than planned)")
    for field in fields(Coefficients):
        before, after = getattr(STANDING, field.name), getattr(best, field.name)
        print(f"    {field.name}: float = {after:.4g}" + ("" if before == after else f"  # was {before:.4g}"))
    for what in ("memory", "time"):
        print(_summary(what, _errors(known, best, what)))


def nearest(start: Coefficients, names: list[str], errors: Callable[[Coefficients], list[float]]) -> Coefficients:
    """Least squares over the logarithms of the named coefficients, which stay positive.

    An error is predicted over measured, less one. Too little counts twice: a job that does not fit is worse than room left.
    """
    origin = np.log([getattr(start, name) for name in names])

    def changed(logarithms: np.ndarray) -> Coefficients:
        return replace(start, **dict(zip(names, np.exp(logarithms).tolist(), strict=True)))

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        found = np.array(errors(changed(logarithms)))
        return np.concatenate([np.where(found < 0, 2 * found, found), 0.02 * (logarithms - origin)])  # unseen ones stay

    return changed(least_squares(residuals, origin).x)


def show_table(name: str, measured: list[Measured]) -> None:
    if not measured:
        return
    print(f"\n{name}: {len(measured)} cases on {measured[0].gpu}\n")
    print("| case | planned GiB | measured | error | planned s | measured | error |\n|---|---|---|---|---|---|---|")
    for m in measured:
        cells = [f"{m.case.name}{'' if m.is_as_planned else ' (other tier)'}"]
        for planned, found in ((_memory(m, STANDING), m.peak_gib), (_seconds(m, STANDING), m.seconds)):
            known = planned is not None and found is not None
            cells += [f"{planned:.2f}", f"{found:.2f}", f"{planned / found - 1:+.1%}"] if known else ["", "", ""]  # type: ignore[operator]
        print(f"| {' | '.join(cells)} |")
    print()
    for what in ("memory", "time"):
        if errors := _errors(measured, STANDING, what):
            print(_summary(what, errors))


def _errors(measured: list[Measured], coefficients: Coefficients, what: str) -> list[float]:
    """Predicted over measured, less one."""
    pairs = [
        (_memory(m, coefficients), m.peak_gib) if what == "memory" else (_seconds(m, coefficients), m.seconds) for m in measured
    ]
    return [planned / found - 1 for planned, found in pairs if planned is not None and found is not None]


def _memory(measured: Measured, coefficients: Coefficients) -> float:
    return estimate_memory(measured.work, coefficients).total_gib


def _seconds(measured: Measured, coefficients: Coefficients) -> float | None:
    gpu = find_gpu(measured.gpu)
    return None if gpu is None else step_seconds(measured.work, gpu, coefficients)


def _summary(what: str, errors: list[float]) -> str:
    ninth = float(np.quantile(np.abs(errors), 0.9))
    return f"{what}: p90 of |error| {ninth:.1%}, most under {min(errors):+.1%}, most over {max(errors):+.1%}, n {len(errors)}"


def _add(results: Results, case: Case, work: Work, device: str, outcome: Outcome) -> None:
    tier = next(event.tier for event in outcome.events if event.kind == "started")
    results.add(case.name, "tier_as_planned", float(tier == work.tier), "", better="higher")
    results.add(case.name, "planned_gib", estimate_memory(work).total_gib, "GiB", better="lower")
    times = [step.step_seconds for step in outcome.timed]
    results.add(case.name, "step_seconds", statistics.median(times), "s", better="lower", n=len(times))
    gpu = find_gpu(device)
    if gpu is not None:
        results.add(case.name, "planned_seconds", step_seconds(work, gpu), "s", better="lower")
    peaks = [step.peak_allocated_gib for step in outcome.steps if step.peak_allocated_gib is not None]
    if peaks:
        results.add(case.name, "peak_allocated_gib", max(peaks), "GiB", better="lower")


if __name__ == "__main__":
    main()
