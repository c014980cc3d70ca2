"""What the benchmarks of training share: rows of random tokens, and a child as a worker starts it, read to its last step."""

from pathlib import Path

import numpy as np

from core.events import ChildEvent
from core.spec import JobSpec
from tests.core.train.runs import Child, run_input

Rows = list[tuple[list[int], list[int]]]
"""(token ids, loss mask) of each."""


def short_lengths(rng: np.random.Generator, count: int, longest: int) -> np.ndarray:
    """int [count], as instruction data is: log-normal, some 130 tokens on average."""
    return np.clip(rng.lognormal(np.log(130) - 0.5 * 0.6**2, 0.6, count), 16, longest).astype(int)


def rows_of(rng: np.random.Generator, lengths: np.ndarray) -> Rows:
    """A row of each length; the share that is answer, and carries loss, is uniform over 0.3 to 0.7."""
    rows = []
    for length in lengths.tolist():
        ids = rng.integers(3, 500, length).tolist()
        answer = int(length * rng.uniform(0.3, 0.7))
        rows.append((ids, [0] * (length - answer) + [1] * answer))
    return rows


def train(model: Path, cache: Path, spec: JobSpec, run_dir: Path) -> tuple[list[ChildEvent], str]:
    """(events, log) of a run up to its result, which is no part of a step; then the child is ended."""
    child = Child(run_input(model, cache, spec).model_copy(update={"device": "auto"}), run_dir)
    while (event := child.next_event()) is not None and not (event.kind == "phase" and event.phase == "saving"):
        pass
    child.close()
    return child.events, child.log.read_text()


def said(events: list[ChildEvent]) -> list[str]:
    """The tier and why, warnings, and why a run ended early."""
    found = []
    for event in events:
        if event.kind == "started":
            found.append(f"{event.tier}: {event.tier_reason}")
        elif event.kind in ("warning", "ended"):
            found.append(event.message)
    return found
