"""What the benchmarks of training share: rows of random tokens, what the plan says of them, and a child as a worker starts it,
read to its last step."""

from pathlib import Path

import numpy as np

from benchmarks.shapes import config_of
from core.eval.rows import Row
from core.events import ChildEvent
from core.model_folder import read_model_facts
from core.plan.shape import model_shape
from core.plan.work import Work, work_of
from core.records import TokenCounts
from core.spec import JobSpec
from core.train.batches import TrainingRows, WeightedRows
from tests.core.train.runs import Child, run_input

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

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


def in_training_order(rows: Rows, spec: JobSpec) -> Rows:
    """The same rows, so ordered that a run of one epoch over their cache trains them in the order given here."""
    drawn = TrainingRows([WeightedRows(_Numbers(len(rows)), 1.0)], eval_rows=0, batch=spec.batch, seed=spec.seed)
    steps = (drawn.step_rows(step) for step in range(1, drawn.steps_per_epoch + 1))
    places = [int(ids[0]) for examples in steps for example in examples for ids, _ in example.sequences]
    return [rows[turn] for turn in np.argsort(places)]


class _Numbers:
    """A token cache whose every row holds its own number: the order of training does not depend on what rows say."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def example(self, number: int, /) -> tuple[Row, ...]:
        return ((np.array([number, number]), np.array([0, 1])),)


def planned_work(shape: str, model: Path | None, spec: JobSpec, rows: Rows, steps: int) -> Work:
    """As the control plane would have it, from the model's config and the preparer's counts. `model` is asked of `tiny` alone."""
    if shape == "tiny":
        assert model is not None
        facts = read_model_facts(model)
        architecture, config, parameters = facts.architecture, facts.config, facts.parameters
    else:
        config = config_of(shape)
        architecture = _ARCHITECTURES[config["model_type"]]
        of = model_shape(architecture, config)
        parameters = of.layers * (of.layer_weights + 2 * of.hidden) + of.hidden + 2 * of.head_weights
    lengths = [(len(ids), sum(mask[1:])) for ids, mask in rows]
    counts = TokenCounts(
        dataset_id="ds_00000000",
        rows=len(lengths),
        examples=len(lengths),
        tokens=sum(length for length, _ in lengths),
        trained_tokens=sum(trained for _, trained in lengths),
        truncated_rows=0,
        rows_without_target=0,
        longest=max(length for length, _ in lengths),
        squared_tokens=sum(length**2 for length, _ in lengths),
    )
    return work_of(spec, architecture=architecture, parameters=parameters, config=config, counts=[counts], steps=steps)


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
