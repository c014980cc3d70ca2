"""Which rows a step trains on: the split, the order of every epoch, and where a run stands in it.

Rows come as tokens and loss masks from caches that the preparer wrote; nothing is tokenised here. Everything is a pure
function of (caches, seed, step), so the number of finished steps *is* the position in the data and a resume needs no more.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.errors import BadData, NoTrainableTokens
from core.eval.rows import Row, trained_tokens
from core.plan import count_steps
from core.spec import BatchSpec, ScheduleSpec


class Rows(Protocol):
    """A token cache, open."""

    def __len__(self) -> int: ...

    def row(self, number: int, /) -> Row: ...


@dataclass(frozen=True)
class WeightedRows:
    rows: Rows
    weight: float  # passes per epoch


@dataclass(frozen=True)
class _Source:
    rows: Rows
    numbers: np.ndarray  # row numbers that may be trained on
    draws: int  # rows drawn per epoch


class TrainingRows:
    """The training split, in the order it is trained, and the held-out rows.

    Held-out rows are drawn by the seed from the distinct contents of all datasets: rows with equal tokens and mask all
    leave the training split with the one that is held out. Raises NoTrainableTokens when no row has a target, BadData when
    `eval_rows` leaves none to train on.
    """

    def __init__(self, datasets: Sequence[WeightedRows], *, eval_rows: int, batch: BatchSpec, seed: int) -> None:
        contents = _by_content(datasets)
        if not contents:
            raise NoTrainableTokens("none of the datasets' rows holds a token to train on")
        if eval_rows >= len(contents):
            raise BadData(f"data.eval_rows: {eval_rows} of {len(contents)} distinct rows with a target leaves none to train on")
        order = np.random.default_rng([seed, 0]).permutation(len(contents))
        groups = list(contents.values())
        held = [groups[i] for i in sorted(order[:eval_rows])]
        gone = {place for group in held for place in group}
        self.eval_rows: list[Row] = [datasets[d].rows.row(n) for (d, n), *_ in held]
        kept = sorted(place for group in groups for place in group if place not in gone)
        self._sources = []
        for number, dataset in enumerate(datasets):
            numbers = np.array([n for d, n in kept if d == number], dtype=np.int64)
            if len(numbers):
                draws = max(1, round(dataset.weight * len(numbers)))
                self._sources.append(_Source(dataset.rows, numbers, draws))
        self.train_rows = len(kept)
        self.rows_per_epoch = sum(source.draws for source in self._sources)
        self.fingerprint = _fingerprint(contents, seed, [dataset.weight for dataset in datasets])
        self._seed = seed
        self._micro_batch_size = batch.micro_batch_size
        self._rows_per_step = batch.micro_batch_size * batch.gradient_accumulation_steps
        self._epoch: tuple[int, list[tuple[int, int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self._rows_per_step)

    def total_steps(self, schedule: ScheduleSpec) -> int:
        return count_steps(self.rows_per_epoch, self._rows_per_step, schedule)

    def epochs_at(self, step: int) -> float:
        """Passes over the data after `step` steps. The last step of an epoch may hold fewer rows than the others."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + rest * self._rows_per_step / self.rows_per_epoch

    def step_rows(self, step: int) -> list[list[Row]]:
        """The micro-batches of step 1, 2, ...: rows of like length together, the longest first."""
        epoch, window = divmod(step - 1, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order_of(epoch))
        first = window * self._rows_per_step
        places = self._epoch[1][first : first + self._rows_per_step]
        rows = [self._sources[source].rows.row(number) for source, number in places]
        rows.sort(key=lambda row: -len(row[0]))
        size = self._micro_batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def first_row(self) -> Row:
        source, number = self._order_of(0)[0]
        return self._sources[source].rows.row(number)

    def _order_of(self, epoch: int) -> list[tuple[int, int]]:
        rng = np.random.default_rng([self._seed, 1, epoch])
        drawn = []
        for index, source in enumerate(self._sources):
            whole, rest = divmod(source.draws, len(source.numbers))
            extra = rng.permutation(source.numbers)[:rest]
            drawn += [(index, int(number)) for number in (*np.tile(source.numbers, whole), *extra)]
        return [drawn[i] for i in rng.permutation(len(drawn))]


def _by_content(datasets: Sequence[WeightedRows]) -> dict[bytes, list[tuple[int, int]]]:
    """Digest of (ids, mask) -> the (dataset, row) places that hold it, rows without a target left out."""
    contents: dict[bytes, list[tuple[int, int]]] = {}
    for place, row in _all_rows(datasets):
        if trained_tokens(row):
            ids, mask = row
            digest = hashlib.sha256(ids.astype("<i4").tobytes())
            digest.update(mask.astype(np.uint8).tobytes())
            contents.setdefault(digest.digest(), []).append(place)
    return contents


def _all_rows(datasets: Sequence[WeightedRows]) -> Iterator[tuple[tuple[int, int], Row]]:
    for number, dataset in enumerate(datasets):
        for row in range(len(dataset.rows)):
            yield (number, row), dataset.rows.row(row)


def _fingerprint(contents: dict[bytes, list[tuple[int, int]]], seed: int, weights: list[float]) -> str:
    digest = hashlib.sha256(repr((seed, weights)).encode())
    for content, places in contents.items():
        digest.update(content)
        digest.update(repr(places).encode())
    return digest.hexdigest()
