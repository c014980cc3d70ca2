"""Which rows a step holds: no leak between the splits, every row as often as asked, the same order for the same seed."""

from collections import Counter

import numpy as np
import pytest

from core.errors import BadData, NoTrainableTokens
from core.eval.rows import Example, Row
from core.spec import BatchSpec, ScheduleSpec
from core.train.batches import TrainingRows, WeightedRows


class Rows:
    """Rows told apart by their first token; each has `length` tokens and one target."""

    def __init__(self, names: list[int], length: int = 3) -> None:
        self.names, self.length = names, length

    def __len__(self) -> int:
        return len(self.names)

    def example(self, number: int, /) -> tuple[Row, ...]:
        ids = np.full(self.length, self.names[number], np.int32)
        return ((ids, np.array([0] * (self.length - 1) + [1], np.uint8)),)


def build(
    *datasets: tuple[Rows, float], eval_rows: int = 0, batch: tuple[int, int] = (2, 2), seed: int = 0, grouped: bool = False
) -> TrainingRows:
    return TrainingRows(
        [WeightedRows(rows, weight) for rows, weight in datasets],
        eval_rows=eval_rows,
        batch=BatchSpec(micro_batch_size=batch[0], gradient_accumulation_steps=batch[1], group_by_length=grouped),
        seed=seed,
    )


def names(examples: list[Example]) -> list[int]:
    return [int(ids[0]) for example in examples for ids, _ in example.sequences]


def epoch_names(rows: TrainingRows, epoch: int = 0) -> list[int]:
    first = epoch * rows.steps_per_epoch + 1
    return [name for step in range(first, first + rows.steps_per_epoch) for name in names(rows.step_rows(step))]


def test_equal_rows_never_stand_on_both_sides() -> None:
    doubled = [n // 2 for n in range(40)]  # every row twice
    for seed in range(20):
        rows = build((Rows(doubled), 1.0), (Rows(doubled), 1.0), eval_rows=5, seed=seed)
        held = set(names(rows.eval_rows))
        assert rows.eval_count == len(rows.eval_rows) == len(held) == 5
        trained = Counter(epoch_names(rows))
        assert not held & set(trained)
        assert trained == dict.fromkeys(set(range(20)) - held, 4)
        assert rows.train_rows == 4 * 15


def test_the_seed_chooses_the_held_out_rows() -> None:
    def held(seed: int) -> list[int]:
        return names(build((Rows(list(range(30))), 1.0), eval_rows=6, seed=seed).eval_rows)

    assert held(1) == held(1)
    assert held(1) != held(2)


def test_holding_out_all_rows_is_refused() -> None:
    with pytest.raises(BadData, match="3 of 3 distinct rows"):
        build((Rows([1, 1, 2, 3]), 1.0), eval_rows=3)


def test_rows_without_a_target_are_no_rows() -> None:
    class Blank(Rows):
        def example(self, number: int, /) -> tuple[Row, ...]:
            ((ids, mask),) = super().example(number)
            only_first = np.zeros_like(mask)
            only_first[0] = 1  # nothing stands before it, so it is never predicted
            return ((ids, only_first),)

    with pytest.raises(NoTrainableTokens):
        build((Blank([1, 2, 3]), 1.0))


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    rows = build((Rows(list(range(11))), 1.0))
    first, second = epoch_names(rows, 0), epoch_names(rows, 1)
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second


def test_the_last_step_of_an_epoch_holds_what_is_left() -> None:
    rows = build((Rows(list(range(11))), 1.0), batch=(2, 2))
    assert [len(names(rows.step_rows(step))) for step in range(1, 7)] == [4, 4, 3, 4, 4, 3]
    assert [rows.epochs_at(step) for step in (3, 4, 6)] == [1.0, pytest.approx(1 + 4 / 11), 2.0]


def test_weights_are_passes_per_epoch() -> None:
    rows = build((Rows(list(range(10))), 2.5), (Rows(list(range(100, 110))), 0.3))
    counts = Counter(epoch_names(rows))
    assert sorted(counts[n] for n in range(10)) == [2] * 5 + [3] * 5
    assert sum(counts[n] for n in range(100, 110)) == 3


def test_the_order_is_a_pure_function_of_the_step() -> None:
    straight = build((Rows(list(range(23))), 1.0), seed=4)
    steps = [names(straight.step_rows(step)) for step in range(1, 15)]
    late = build((Rows(list(range(23))), 1.0), seed=4)
    assert [names(late.step_rows(step)) for step in range(9, 15)] == steps[8:]


def test_grouped_by_length_a_step_holds_rows_of_like_length_and_an_epoch_every_row_once() -> None:
    lengths = list(range(2, 25))
    rows = build(*((Rows([n], length=n), 1.0) for n in lengths), grouped=True)
    steps = [[example.longest for example in rows.step_rows(step)] for step in range(1, rows.steps_per_epoch + 1)]
    assert sorted(n for step in steps for n in step) == lengths
    assert all(max(step) - min(step) == len(step) - 1 for step in steps)
    assert len(steps[-1]) == 3, "what does not fill a step stays last"
    assert steps != sorted(steps, reverse=True), "the steps are in an order of chance"


def test_references_belong_to_their_examples_whatever_the_order() -> None:
    rows = build((Rows(list(range(12))), 1.0), (Rows([90, 91]), 1.0), eval_rows=3)
    rows.measure_references(lambda examples: [(float(name),) for name in names(examples)])
    for example in [*rows.eval_rows, *(e for step in range(1, 4) for e in rows.step_rows(step)), rows.first_row()]:
        assert example.reference == (float(names([example])[0]),)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1.0, None, 3), (2.0, None, 6), (0.5, None, 2), (0.01, None, 1), (2.0, 4, 4)]
)
def test_steps_of_a_schedule(epochs: float, max_steps: int | None, expected: int) -> None:
    rows = build((Rows(list(range(11))), 1.0))
    assert rows.total_steps(ScheduleSpec(epochs=epochs, max_steps=max_steps)) == expected


def test_the_fingerprint_changes_with_the_data() -> None:
    one = build((Rows([1, 2, 3]), 1.0)).fingerprint
    assert one == build((Rows([1, 2, 3]), 1.0)).fingerprint
    assert one != build((Rows([1, 2, 4]), 1.0)).fingerprint
    assert one != build((Rows([1, 2, 3]), 2.0)).fingerprint
