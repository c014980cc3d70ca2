"""How a spec says its batch."""

from typing import Any

import pytest
from pydantic import ValidationError

from core.spec import BatchSpec


@pytest.mark.parametrize(
    ("fields", "at_once", "of_a_step"),
    [
        ({}, 4, 4),
        ({"micro_batch_size": 3, "gradient_accumulation_steps": 5}, 3, 15),
        ({"micro_batch_size": 3, "rows_per_step": 16}, 3, 16),
        ({"micro_batch_size": "auto", "rows_per_step": 16}, 4, 16),
        ({"micro_batch_size": "auto", "rows_per_step": 2}, 2, 2),
    ],
)
def test_rows_at_once_and_rows_of_a_step(fields: dict[str, Any], at_once: int, of_a_step: int) -> None:
    batch = BatchSpec.model_validate(fields)
    assert (batch.rows_at_once, batch.step_rows) == (at_once, of_a_step)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"micro_batch_size": "auto"}, "needs rows_per_step"),
        ({"rows_per_step": 8, "gradient_accumulation_steps": 2}, "in place of|takes the place"),
        ({"micro_batch_size": 16, "rows_per_step": 8}, "exceeds rows_per_step"),
        ({"micro_batch_size": "most"}, "auto"),
        ({"micro_batch_size": 0}, "greater than or equal to 1"),
    ],
)
def test_rows_are_said_once(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        BatchSpec.model_validate(fields)
