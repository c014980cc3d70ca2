"""Training children that are set up side by side, and then train one by one, each alone on the device.

Setting up a child takes longer than its timed steps: imports, weights, quantising, a few rows through every tier, most kernels
compiled. None of it says how fast the child trains. So a batch of children starts at once, and one that has told that it begins
with its first step (`started`) is stopped by SIGSTOP. When all of a batch stand, each in turn goes on by SIGCONT, trains its
warm-up steps and its timed ones, and is ended. Nobody else computes meanwhile: no child of the batch, no other batch. The pause
falls into the first warm-up step.

Memory is a process's own, so neighbours change no peak. A child that stands holds weights and little else, so a batch is as
large as what stands beside the one that trains leaves room for, by their plans; those that take most train last. A run that was
short of memory beside others is done again by itself; one that was short of it alone has no numbers, because it has trained
something else than what was asked for.
"""

import argparse
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.children import said
from core.events import ChildEvent, Step
from core.plan.memory import GIB as BYTES
from core.plan.memory import estimate_memory
from core.plan.work import Work
from core.spec import JobSpec
from core.states import Reason
from tests.core.train.runs import Child, run_input

GIB = 70.0
"""Of an 80 GB card: what the children of a batch may hold together."""
AT_ONCE = max(1, min(6, (os.cpu_count() or 1) // 2))
SILENT_SECONDS = 300.0
_RESERVED = 1.1
"""The allocator holds more than its tensors at their peak: blocks of sizes that are not asked for again."""
_CONTEXT_GIB = 1.0
"""Of the device, for a process's context and its libraries' workspaces."""
_PROBE_GIB = 2.0
"""What the allocator of a child that stands still holds of the rows that went through every tier."""
_TICK_SECONDS = 1.0
_STOP_SECONDS = 30.0
"""A thread stops when it comes back from the kernel, and a driver may keep it there for a while."""


@dataclass(frozen=True)
class Run:
    """A child to be timed: all the steps of its spec but the first `warm_up`, which are at least one."""

    name: str
    model: Path
    cache: Path
    spec: JobSpec
    folder: Path
    warm_up: int
    peak_gib: float
    """Of allocated memory, as planned."""
    standing_gib: float
    """Held before the first step."""


def run_of_work(work: Work, *, name: str, model: Path, cache: Path, folder: Path, warm_up: int) -> Run:
    """With the memory of its plan."""
    planned = estimate_memory(work)
    standing = planned.weights_gib + 4 * work.trainable / BYTES + _PROBE_GIB  # fp32 gradients of the rows that were compared
    return Run(name, model, cache, work.spec, folder, warm_up, planned.total_gib, min(standing, planned.total_gib))


@dataclass(frozen=True)
class Outcome:
    run: Run
    events: list[ChildEvent]
    steps: list[Step]
    trouble: str
    """Why there are no numbers, with what the child said and the end of its log; empty if every step was trained."""

    @property
    def timed(self) -> list[Step]:
        return self.steps[self.run.warm_up :]


def measure_alone(
    runs: Sequence[Run],
    *,
    gib: float = GIB,
    at_once: int = AT_ONCE,
    silent_seconds: float = SILENT_SECONDS,
    begin_until: float = inf,
    end_at: float = inf,
) -> Iterator[Outcome]:
    """Outcomes of all the runs, each as soon as it is known, in batches that keep to the order of `runs` where room allows.

    `begin_until` and `end_at` are moments of time.monotonic(): no batch begins after the first, and what trains at the second is
    ended. A child that tells nothing for `silent_seconds` is ended. None is left when the iterator is closed or fails. Children
    die with the thread that started them, so iterate in one that stays.
    """
    waiting = list(runs)
    began = time.monotonic()
    while waiting:
        if time.monotonic() > min(begin_until, end_at):
            yield from (Outcome(run, [], [], "not begun, the time is up") for run in waiting)
            return
        batch = next_batch(waiting, gib, at_once)
        for run in batch:
            waiting.remove(run)
        print(f"{time.monotonic() - began:.0f} s: begun side by side: {', '.join(run.name for run in batch)}", flush=True)
        for outcome in _measure(batch, silent_seconds, end_at):
            if len(batch) > 1 and _was_short_of_memory(outcome.events):
                print(f"{outcome.run.name}: short of memory beside the others, will be done again by itself", flush=True)
                waiting.append(replace(outcome.run, folder=outcome.run.folder / "again", peak_gib=inf))
            else:
                yield outcome
        print(f"{time.monotonic() - began:.0f} s: the batch is done", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `limits` reads."""
    parser.add_argument("--gib", type=float, default=GIB, help="device memory that the children of a batch may hold together")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="children of a batch at most")
    parser.add_argument("--limit-seconds", type=float, default=inf, help="no batch is begun after that")
    parser.add_argument("--end-seconds", type=float, default=inf, help="children that still train after that are ended")


def limits(arguments: argparse.Namespace, began: float) -> dict[str, Any]:
    """Of `measure_alone`, by the command line; `began` is the program's first moment by time.monotonic()."""
    until = {"begin_until": began + arguments.limit_seconds, "end_at": began + arguments.end_seconds}
    return {"gib": arguments.gib, "at_once": arguments.at_once, **until}


def next_batch(waiting: Sequence[Run], gib: float, at_once: int) -> list[Run]:
    """The first that waits, and of the others, in their order, those that there is room for beside it."""
    batch: list[Run] = []
    for run in waiting:
        if not batch or (len(batch) < at_once and needed_gib([*batch, run]) <= gib):
            batch.append(run)
    return batch


def needed_gib(batch: Sequence[Run]) -> float:
    """Of the device, at the moment of the batch that takes most: one trains, those after it stand, those before it are gone."""
    turns = in_turn(batch)
    standing = [sum(run.standing_gib + _CONTEXT_GIB for run in turns[turn:]) for turn in range(len(turns))]
    return max(held + _RESERVED * run.peak_gib - run.standing_gib for held, run in zip(standing, turns, strict=True))


def in_turn(batch: Sequence[Run]) -> list[Run]:
    """Those that take most train last, when the others have made room."""
    return sorted(batch, key=lambda run: run.peak_gib)


class _Running:
    """The child of a run, and whether more is to be heard of it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.child = Child(run_input(run.model, run.cache, run.spec).model_copy(update={"device": "auto"}), run.folder)
        self.heard = time.monotonic()
        self.went_on: float | None = None  # as events have it: Unix seconds
        self.is_over = False
        self.trouble = ""

    def fileno(self) -> int:
        return self.child.fileno()

    @property
    def has_started(self) -> bool:
        return any(event.kind == "started" for event in self.child.events)

    def listen(self) -> None:
        """Take one event. Saving the result is no part of a step."""
        event = self.child.next_event()
        self.heard = time.monotonic()
        if event is None or event.kind == "ended" or (event.kind == "phase" and event.phase == "saving"):
            self.end()

    def end(self, trouble: str = "") -> None:
        self.is_over, self.trouble = True, trouble
        self.child.close()

    def stop(self) -> None:
        """Come back when no thread of it runs, or it is gone; one that would disturb the others is ended."""
        os.kill(self.child.process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_SECONDS
        while os.waitid(os.P_PID, self.child.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                self.end(f"was told to stop, and did not in {_STOP_SECONDS:.0f} s")
                return
            time.sleep(0.01)

    def go_on(self) -> None:
        self.heard, self.went_on = time.monotonic(), time.time()
        os.kill(self.child.process.pid, signal.SIGCONT)

    def outcome(self) -> Outcome:
        events, asked = self.child.events, self.run.spec.schedule.max_steps
        steps = [event for event in events if event.kind == "step"]
        trouble = self.trouble
        if not trouble and _was_short_of_memory(events):
            trouble = "short of memory"
        timed = steps[self.run.warm_up :]
        if not trouble and timed and self.went_on is not None and timed[0].at < self.went_on:
            trouble = "was stopped too late: a timed step was trained beside others"
        if trouble or len(steps) != asked:
            words = [*([trouble] if trouble else []), f"{len(steps)} of {asked} steps were trained", *said(events)]
            trouble = f"{'; '.join(words)}\n{self.child.log.read_text()[-2000:]}"
        return Outcome(self.run, events, steps, trouble)


def _measure(batch: Sequence[Run], silent_seconds: float, end_at: float) -> Iterator[Outcome]:
    with ExitStack() as stack:
        began = time.monotonic()
        children: list[_Running] = []
        for run in in_turn(batch):
            try:
                running = _Running(run)
            except OSError as error:
                yield Outcome(run, [], [], f"the child could not be started: {error}")
                continue
            stack.callback(running.child.close)
            children.append(running)

        starting = list(children)
        while starting:
            _listen(starting, silent_seconds, end_at)
            for running in [*starting]:
                if running.has_started and not running.is_over and len(children) > 1:  # one alone disturbs nobody
                    running.stop()
                    print(
                        f"{running.run.name}: {'ended' if running.is_over else 'stands'} after {time.monotonic() - began:.0f} s",
                        flush=True,
                    )
                if running.has_started or running.is_over:
                    starting.remove(running)

        for running in children:
            if not running.is_over and len(children) > 1:
                running.go_on()
            while not running.is_over:
                _listen([running], silent_seconds, end_at)
            yield running.outcome()


def _listen(children: Sequence[_Running], silent_seconds: float, end_at: float) -> None:
    """Take an event of each child that has one, after a while at most; end those that must not go on."""
    ready = select.select(children, [], [], _TICK_SECONDS)[0]
    for running in children:
        if running in ready:
            running.listen()
        now = time.monotonic()
        if not running.is_over and now > end_at:
            running.end("the time was up")
        elif not running.is_over and now - running.heard > silent_seconds:
            running.end(f"no word for {silent_seconds:.0f} s")


def _was_short_of_memory(events: Sequence[ChildEvent]) -> bool:
    """It halved its micro-batches, or ended so."""
    return any(
        (event.kind == "warning" and event.code == "micro_batch_halved")
        or (event.kind == "ended" and event.reason == Reason.CUDA_OOM)
        for event in events
    )
