"""How a step is cut: everything once, nothing above the bound, and half as much when memory was too small."""

import numpy as np
import pytest

from core.eval.layout import Layout, Packed, Padded
from core.eval.rows import Example


def step(*lengths: int) -> list[Example]:
    return [Example(((np.full(length, 5, np.int32), np.ones(length, np.uint8)),)) for length in lengths]


def most(layout: Layout, examples: list[Example]) -> int:
    """Tokens of the largest micro-batch, padding included."""
    padded = isinstance(layout, Padded)
    return max(
        len(part) * max(example.longest for example in part) if padded else sum(example.tokens for example in part)
        for part in layout.split(examples)
    )


@pytest.mark.parametrize("layout", [Padded(3), Packed(40), Packed(8)], ids=str)
def test_every_example_is_in_one_micro_batch(layout: Layout) -> None:
    examples = step(5, 30, 8, 8, 21, 1, 13)
    parts = layout.split(examples)
    assert sorted(id(example) for part in parts for example in part) == sorted(map(id, examples))
    for part in parts:
        assert len(part) <= 3 if isinstance(layout, Padded) else len(part) == 1 or sum(e.tokens for e in part) <= layout.tokens


@pytest.mark.parametrize("layout", [Padded(64), Padded(8), Packed(4096), Packed(100)], ids=str)
def test_half_is_half_of_what_the_step_had_in_memory(layout: Layout) -> None:
    """A bound far above the step's rows must not be what is halved: the step would be as large as before."""
    examples = step(10, 12, 11, 10, 12, 11, 10, 12)
    smaller = layout.halved(examples)
    assert smaller is not None
    assert most(smaller, examples) <= most(layout, examples) // 2


def test_one_row_can_t_be_halved() -> None:
    assert Padded(4).halved(step(9)) is None
    assert Packed(100).halved(step(9)) is None
    assert Packed(9).halved(step(9, 9, 9)) is None
    assert Packed(30).halved(step(20, 9)) == Packed(20)
