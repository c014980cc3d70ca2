"""Which rows a step trains on: the split, the order of every epoch, and where a run stands in it.

Examples come as tokens and loss masks from caches that the preparer wrote; nothing is tokenised here. Everything is a pure
function of (caches, seed, step), so the number of finished steps *is* the position in the data and a resume needs no more.
How a step is cut into micro-batches is the layout's business (`core.eval.layout`).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.errors import BadData, NoTrainableTokens
from core.eval.rows import Example, Row, trained_tokens
from core.plan import count_steps
from core.spec import BatchSpec, ScheduleSpec
from core.train.pairs import PairRows

Place = tuple[int, int]
"""(dataset, example in its cache)"""

_STEPS_SORTED_TOGETHER = 50


class Rows(Protocol):
    """A token cache, open, or PairRows. An example is one row, or the pair (chosen, rejected)."""

    def __len__(self) -> int: ...

    def example(self, number: int, /) -> tuple[Row, ...]: ...


@dataclass(frozen=True)
class WeightedRows:
    rows: Rows
    weight: float  # passes per epoch


@dataclass(frozen=True)
class _Source:
    dataset: int
    numbers: np.ndarray  # examples that may be trained on
    draws: int  # examples drawn per epoch


class TrainingRows:
    """The training split, in the order it is trained, and the held-out rows.

    Held-out rows are drawn by the seed from the distinct contents of all datasets: rows with equal tokens and mask all
    leave the training split with the one that is held out. Of pictures with captions it is pictures that are drawn, each with
    all of its captions, so that none is half known; and the last step of an epoch is filled up with what the next one begins
    with, since the loss of fewer pairs is another loss. Raises NoTrainableTokens when no row has a target, BadData when
    `eval_rows` leaves none to train on. "Row" means example throughout: a preference's pair counts as one.
    """

    def __init__(self, datasets: Sequence[WeightedRows], *, eval_rows: int, batch: BatchSpec, seed: int) -> None:
        contents = _by_content(datasets)
        self._has_pairs = any(isinstance(dataset.rows, PairRows) for dataset in datasets)
        if not contents:
            raise NoTrainableTokens("none of the datasets' rows holds a token to train on")
        if eval_rows >= len(contents):
            what = "pictures" if self._has_pairs else "rows with a target"
            raise BadData(f"data.eval_rows: {eval_rows} of {len(contents)} distinct {what} leaves none to train on")
        order = np.random.default_rng([seed, 0]).permutation(len(contents))
        groups = list(contents.values())
        held = [groups[i] for i in sorted(order[:eval_rows])]
        gone = {place for group in held for places in group.values() for place in places}
        self._datasets = [dataset.rows for dataset in datasets]
        self._references: list[np.ndarray] | None = None
        self._held = [places[0] for group in held for places in group.values()]
        self.eval_count = len(self._held)
        kept = sorted(place for group in groups for places in group.values() for place in places if place not in gone)
        self._sources = []
        for number, dataset in enumerate(datasets):
            numbers = np.array([n for d, n in kept if d == number], dtype=np.int64)
            if len(numbers):
                draws = max(1, round(dataset.weight * len(numbers)))
                self._sources.append(_Source(number, numbers, draws))
        self.train_rows = len(kept)
        self.distinct_rows = len(contents) - len(held)
        self.rows_per_epoch = sum(source.draws for source in self._sources)
        self.fingerprint = _fingerprint(contents, seed, [dataset.weight for dataset in datasets])
        self._seed = seed
        self._group_by_length = batch.group_by_length
        self.rows_per_step = batch.step_rows
        self._epoch: tuple[int, list[Place]] = (-1, [])

    @property
    def eval_rows(self) -> list[Example]:
        return [self._example(place) for place in self._held]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.rows_per_step)

    def total_steps(self, schedule: ScheduleSpec) -> int:
        return count_steps(self.rows_per_epoch, self.rows_per_step, schedule)

    def epochs_at(self, step: int) -> float:
        """Passes over the data after `step` steps. The last step of an epoch may hold fewer rows than the others."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + rest * self.rows_per_step / self.rows_per_epoch

    def step_rows(self, step: int) -> list[Example]:
        """The examples of step 1, 2, ...: the step's whole batch, whatever is in memory at once."""
        epoch, window = divmod(step - 1, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order_of(epoch))
        first = window * self.rows_per_step
        places = self._epoch[1][first : first + self.rows_per_step]
        if self._has_pairs and len(places) < self.rows_per_step:
            there = set(places)
            more = [place for place in dict.fromkeys(self._order_of(epoch + 1)) if place not in there]
            places = places + more[: self.rows_per_step - len(places)]
        return [self._example(place) for place in places]

    def first_row(self) -> Example:
        return self._example(self._order_of(0)[0])

    def ids_from(self, first: int) -> set[int]:
        """Which of the ids `first` and above stand in the datasets, held out or not."""
        examples = (rows.example(number) for rows in self._datasets for number in range(len(rows)))
        return {int(token) for example in examples for ids, _ in example for token in ids[ids >= first]}

    def measure_references(self, measure: Callable[[list[Example]], list[tuple[float, ...]]]) -> None:
        """Ask once for the reference log-probabilities of every example that will be trained on or held out."""
        places = sorted({*self._held, *((s.dataset, int(n)) for s in self._sources for n in s.numbers)})
        width = len(self._datasets[places[0][0]].example(places[0][1]))
        references = [np.full((len(rows), width), np.nan) for rows in self._datasets]
        for (dataset, number), values in zip(places, measure([self._example(place) for place in places]), strict=True):
            references[dataset][number] = values
        self._references = references

    def _example(self, place: Place) -> Example:
        dataset, number = place
        rows = self._datasets[dataset]
        if isinstance(rows, PairRows):
            return rows.pair(number)
        reference = () if self._references is None else tuple(self._references[dataset][number].tolist())
        return Example(rows.example(number), reference)

    def _order_of(self, epoch: int) -> list[Place]:
        rng = np.random.default_rng([self._seed, 1, epoch])
        drawn: list[Place] = []
        for source in self._sources:
            whole, rest = divmod(source.draws, len(source.numbers))
            extra = rng.permutation(source.numbers)[:rest]
            drawn += [(source.dataset, int(number)) for number in (*np.tile(source.numbers, whole), *extra)]
        order = [drawn[i] for i in rng.permutation(len(drawn))]
        return self._grouped(order, rng) if self._group_by_length else order

    def _grouped(self, order: list[Place], rng: np.random.Generator) -> list[Place]:
        """Neighbours of like length, the steps in an order of chance; what does not fill a step stays last."""
        span = self.rows_per_step * _STEPS_SORTED_TOGETHER
        size = self.rows_per_step
        steps: list[list[Place]] = []
        for begin in range(0, len(order), span):
            part = sorted(order[begin : begin + span], key=lambda place: -self._example(place).longest)
            steps += [part[i : i + size] for i in range(0, len(part), size)]
        short = [steps.pop()] if len(steps[-1]) < size else []
        return [place for i in rng.permutation(len(steps)) for place in steps[i]] + [p for step in short for p in step]


def _by_content(datasets: Sequence[WeightedRows]) -> dict[bytes, dict[bytes, list[Place]]]:
    """What is held out together -> digest of (ids, mask, picture) -> the places that hold it, examples without a target left out.

    Rows of text stand by themselves, captions with the others of their picture.
    """
    contents: dict[bytes, dict[bytes, list[Place]]] = {}
    for number, dataset in enumerate(datasets):
        for row in range(len(dataset.rows)):
            sequences = dataset.rows.example(row)
            if not all(trained_tokens(sequence) for sequence in sequences):
                continue
            digest = hashlib.sha256()
            for ids, mask in sequences:
                digest.update(ids.astype("<i4").tobytes())
                digest.update(mask.astype(np.uint8).tobytes())
            picture = dataset.rows.picture(row) if isinstance(dataset.rows, PairRows) else b""
            digest.update(picture)
            content = digest.digest()
            contents.setdefault(picture or content, {}).setdefault(content, []).append((number, row))
    return contents


def _fingerprint(contents: dict[bytes, dict[bytes, list[Place]]], seed: int, weights: list[float]) -> str:
    digest = hashlib.sha256(repr((seed, weights)).encode())
    for group in contents.values():
        for content, places in group.items():
            digest.update(content)
            digest.update(repr(places).encode())
    return digest.hexdigest()
