"""The kernel that draws tokens against the sampler in plain torch, row by row and draw by draw.

    python -m pytest -c /dev/null --rootdir=. --confcutdir=tests/gpu tests/gpu/test_serving_sampling.py

With TRITON_INTERPRET=1 in the environment it runs on a CPU.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from core.infer.sampling import Drawing, Sampling, _all_told, _drawn, draw, told_by_kernel

pytestmark = pytest.mark.gpu
PLANS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.05},
    {"temperature": 1.8},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1e-300},
]
ROWS = 256 if torch.cuda.is_available() else 48


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows_of(count: int) -> list[Drawing]:
    return [
        Drawing(Sampling(max_tokens=9, **PLANS[number % len(PLANS)]), number, (), (0,) * (number % 5), ())
        for number in range(count)
    ]


def both(logits: torch.Tensor, rows: list[Drawing]) -> tuple[list[Any], list[Any]]:
    """What the kernel says of each row, and what plain torch does."""
    found = torch.full((len(rows), 3), -7.0, dtype=torch.float64, device=logits.device)
    told_by_kernel(logits, rows, range(len(rows)), found)
    plain = _all_told(logits, rows, 0)
    return [[_drawn(row, line, 0) for row, line in zip(rows, told.tolist(), strict=True)] for told in (found, plain)]  # type: ignore[return-value]


@pytest.mark.parametrize("vocabulary", [1, 700, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernel_draws_what_plain_torch_does(device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(ROWS, vocabulary, generator=generator)).to(device, dtype)
    if vocabulary > 3:
        logits[::7, 3] = -float("inf")
    found, plain = both(logits, rows_of(ROWS))
    assert [one.token for one in found] == [one.token for one in plain]
    assert all(one.is_finite for one in found)
    torch.testing.assert_close(
        torch.tensor([one.logprob for one in found]), torch.tensor([one.logprob for one in plain]), rtol=0, atol=1e-5
    )


def test_of_equal_best_ones_the_first_is_taken(device: torch.device) -> None:
    logits = torch.zeros(2, 20_000, device=device)
    logits[0, 9_000], logits[0, 17_000], logits[1, 19_999] = 5, 5, 5
    found, _ = both(logits, [rows_of(1)[0]] * 2)
    assert [one.token for one in found] == [9_000, 19_999]


def test_rows_that_are_no_numbers_fail_alone(device: torch.device) -> None:
    logits = torch.randn(18, 700, generator=torch.Generator().manual_seed(0)).to(device)
    rows = rows_of(18)
    good, _ = both(logits, rows)
    logits[1, 3], logits[2, 6], logits[3] = float("nan"), float("inf"), -float("inf")
    logits[6], logits[7] = float("nan"), float("nan")
    found, _ = both(logits, rows)
    bad = {1, 2, 3, 6, 7}
    assert [one.is_finite for one in found] == [number not in bad for number in range(18)]
    assert all(found[number] == good[number] for number in range(18) if number not in bad)
    assert all(0 <= one.token < 700 for one in found)


def test_a_row_gets_the_same_in_any_company(device: torch.device) -> None:
    """Rows that the kernel can't draw stand between those that it can."""
    logits = torch.randn(20, 5_000, generator=torch.Generator().manual_seed(0)).to(device)
    rows = rows_of(20)
    for number, options in ((3, {"top_p": 0.8}), (4, {"top_k": 5}), (8, {"top_logprobs": 3}), (9, {"logit_bias": ((5, 4.0),)})):
        rows[number] = Drawing(Sampling(max_tokens=9, temperature=0.9, **options), number, (), (), ())
    alone = [draw(logits[number : number + 1], rows[number : number + 1])[0] for number in range(20)]
    assert draw(logits, rows) == alone
    assert len(alone[8].top) == 3
