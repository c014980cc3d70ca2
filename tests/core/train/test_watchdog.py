"""Doomed runs end at the step they should, with their code; healthy runs of every kind are left alone."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import Doomed, GradientExploded, LossIsZero, LossStuck
from core.spec import DpoObjective, Objective, OrpoObjective, PlainTextObjective, SftObjective
from core.states import EXIT_REASONS, JobStatus, Reason, Retry
from core.train.watchdog import Watchdog, say_checkpoint

SFT = SftObjective()
Step = tuple[float, float]
"""(loss, gradient norm)"""


def walk(watchdog: Watchdog, steps: Iterable[Step], first: int = 1) -> int:
    """Show steps one after another; returns the last."""
    step = first - 1
    for step, (loss, norm) in enumerate(steps, first):
        watchdog.see(step, loss, norm)
    return step


def healthy(count: int, seed: int = 0) -> list[Step]:
    """As losses and norms of small batches are: falling, noisy, now and then a row of its own kind."""
    rng = np.random.default_rng(seed)
    losses = 1.2 + np.exp(-np.arange(count) / 40) + rng.normal(0, 0.2, count)
    norms = rng.lognormal(-0.5, 0.7, count)
    norms[rng.random(count) < 0.01] *= 5000
    return list(zip(np.maximum(losses, 0.05).tolist(), norms.tolist(), strict=True))


def two_kinds(count: int, share: float, seed: int = 0) -> list[Step]:
    """Pairs of a preference run near its end, one a step: most are learned, `share` of them are not."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count) < share
    losses = np.where(hard, rng.uniform(0.5, 3, count), rng.uniform(1e-3, 1e-2, count))
    norms = np.where(hard, rng.uniform(5, 50, count), rng.uniform(1e-4, 1e-3, count))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


HEALTHY: dict[str, tuple[Objective, bool, Callable[[int], list[Step]]]] = {
    "ordinary": (SFT, True, lambda seed: healthy(2000, seed)),
    "plain text": (PlainTextObjective(), True, lambda seed: healthy(2000, seed)),
    # A warm-up and B = 0: gradients begin small and grow a hundredfold within the first steps.
    "a lora's first steps": (SFT, True, lambda _: [(2.5 + 0.1 * math.sin(n), 0.01 * min(n, 100) ** 1.5) for n in range(1, 200)]),
    "one spike after another": (SFT, True, lambda _: [(2 + n % 7, 9e6 if n % 6 > 1 and n > 20 else 1.0) for n in range(300)]),
    # Four copies of one row: it is known by heart in the end, to the last bit, and then one step shakes it.
    "by heart": (
        SFT,
        False,
        lambda _: [(3 * 0.9**n, 2 * 0.9**n) for n in range(300)] + [(0.0, 1e-9)] * 100 + [(1e-6, 1e-3)] * 6 + [(0.0, 0.0)] * 60,
    ),
    # One batch over and over, whose rows contradict each other: the loss stands where it must, the rate runs out.
    "full batch": (SFT, False, lambda _: [(math.log(2) + 0.7**n, 0.7**n) for n in range(300)]),
    "dpo in a long warm-up": (DpoObjective(), True, lambda _: [(math.log(2) - 1e-9 * n, 12.0) for n in range(300)]),
    "pairs of two kinds, few hard": (DpoObjective(), True, lambda seed: two_kinds(3000, 0.05, seed)),
    "pairs of two kinds, many hard": (DpoObjective(), True, lambda seed: two_kinds(3000, 0.4, seed)),
    "hinge, all told apart": (
        DpoObjective(loss="hinge"),
        True,
        lambda _: [(1 - 0.1 * n, 9.0) for n in range(10)] + [(0.0, 0.0)] * 80 + [(0.3, 20.0)] * 9,
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name: str) -> None:
    objective, rows_differ, steps = HEALTHY[name]
    for seed in range(10):
        run = steps(seed)
        assert walk(Watchdog(objective, rows_differ=rows_differ), run) == len(run)


def test_the_golden_runs_are_left_alone() -> None:
    golden = json.loads((Path(__file__).parents[2] / "golden" / "train_losses.json").read_text())
    for run in golden.values():
        steps = list(zip(run["loss"], run["grad_norm"], strict=True))
        assert walk(Watchdog(SFT, rows_differ=True), steps) == len(steps) > 0


@pytest.mark.parametrize("objective", [SFT, OrpoObjective(), DpoObjective()])
@pytest.mark.parametrize("norm", [0.0, 0.4])
@pytest.mark.parametrize("before", [0, 30])
def test_three_losses_of_exactly_zero_end_the_run(objective: Objective, norm: float, before: int) -> None:
    watchdog = Watchdog(objective, rows_differ=True)
    last = walk(watchdog, [*healthy(before), (0.0, norm), (0.0, norm), (1.3, 0.5), (0.0, norm), (0.0, norm)])
    with pytest.raises(LossIsZero, match=f"steps {last - 1} to {last + 1}: the loss was exactly 0") as caught:
        watchdog.see(last + 1, 0.0, norm)
    assert caught.value.since == last - 1


def test_an_exploded_gradient_ends_the_run() -> None:
    watchdog = Watchdog(SFT, rows_differ=True)
    steps = [(2.0 + 0.1 * math.sin(n), 0.8) for n in range(60)]
    last = walk(watchdog, [*steps, *[(2.5, 5e3)] * 4, (2.1, 0.9), *[(9.0, 900.0 + n) for n in range(4)]])
    with pytest.raises(GradientExploded, match=r"steps 66 to 70: .* 1e\+05 by now, .*median of 0\.8 \(loss 11\)") as caught:
        watchdog.see(last + 1, 11.0, 1e5)
    assert caught.value.since == 66


def test_an_explosion_does_not_become_what_is_usual() -> None:
    """Four bad steps in five, for longer than the window: once there are five in a row it is still told."""
    watchdog = Watchdog(SFT, rows_differ=True)
    run = [*healthy(60), *([(4.0, 1e7)] * 4 + [(2.0, 1.0)]) * 40, *[(5.0, 1e7)] * 4]
    last = walk(watchdog, run)
    with pytest.raises(GradientExploded):
        watchdog.see(last + 1, 5.0, 1e7)


def test_the_first_steps_are_only_listened_to() -> None:
    watchdog = Watchdog(SFT, rows_differ=True)
    walk(watchdog, [(2.0 + 0.1 * n, 0.01) for n in range(9)] + [(5.0 + n, 1e6) for n in range(9)])
    late = Watchdog(SFT, rows_differ=True)
    walk(late, [(2.0 + 0.1 * n, 0.01) for n in range(10)])
    with pytest.raises(GradientExploded, match="steps 11 to 15"):
        walk(late, [(5.0 + n, 1e6) for n in range(9)], first=11)


def test_a_spike_does_not_hide_an_explosion() -> None:
    watchdog = Watchdog(SFT, rows_differ=True)
    walk(watchdog, [(2.0 + 0.1 * n, 500.0 if n == 4 else 1.0) for n in range(12)])
    with pytest.raises(GradientExploded, match="steps 13 to 17"):
        walk(watchdog, [(5.0 + n, 2000.0) for n in range(9)], first=13)


@pytest.mark.parametrize("objective", [SFT, PlainTextObjective(), OrpoObjective()])
def test_one_loss_on_all_rows_ends_the_run(objective: Objective) -> None:
    watchdog = Watchdog(objective, rows_differ=True)
    stuck = [(math.log(512) * (1 + 4e-7 * math.sin(n)), 0.2) for n in range(49)]
    last = walk(watchdog, [*healthy(20), *stuck])
    with pytest.raises(LossStuck, match=r"steps 21 to 70: the loss stayed at 6\.23832\d over different rows") as caught:
        watchdog.see(last + 1, math.log(512), 0.2)
    assert caught.value.since == 21


@pytest.mark.parametrize("objective", [SFT, DpoObjective()])
def test_a_loss_without_any_gradient_ends_the_run(objective: Objective) -> None:
    watchdog = Watchdog(objective, rows_differ=False)
    last = walk(watchdog, [*healthy(20), *[(2.0 + n, 0.0) for n in range(9)]])
    with pytest.raises(LossStuck, match=r"steps 21 to 30: the gradient was exactly 0 at a loss of 3\.1") as caught:
        watchdog.see(last + 1, 3.1, 0.0)
    assert caught.value.since == 21


DOOMED: list[tuple[list[Step], type[Doomed]]] = [
    ([*healthy(20), *[(0.0, 0.0)] * 3], LossIsZero),
    ([*healthy(60), *[(9.0, 1e8)] * 5], GradientExploded),
    ([*healthy(20), *[(6.0, 0.3)] * 50], LossStuck),
    ([*healthy(20), *[(2.0, 0.0)] * 10], LossStuck),
]


@pytest.mark.parametrize(("run", "error"), DOOMED)
def test_a_resumed_run_ends_where_an_uninterrupted_one_would(run: list[Step], error: type[Doomed]) -> None:
    for interrupted in range(len(run)):
        first = Watchdog(SFT, rows_differ=True)
        walk(first, run[:interrupted])
        second = Watchdog(SFT, rows_differ=True)
        second.restore(json.loads(json.dumps(first.state())))
        walk(second, run[interrupted:-1], first=interrupted + 1)
        with pytest.raises(error, match=f" to {len(run)}: "):
            second.see(len(run), *run[-1])


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (LossIsZero, "loss_is_zero", 16),
        (GradientExploded, "gradient_explosion", 17),
        (LossStuck, "loss_does_not_move", 18),
    ],
)
def test_each_end_has_a_stable_code_and_is_final(error: type[Doomed], code: str, exit_code: int) -> None:
    reason = error("steps 1 to 3: so", 1).reason
    assert (reason, EXIT_REASONS[exit_code]) == (Reason(code), reason)
    assert (reason.facts.job, reason.facts.retry) == (JobStatus.FAILED, Retry.NEVER)


@pytest.mark.parametrize(
    ("since", "saved", "keep", "told"),
    [
        (45, [10, 20, 30, 40], 2, "The last good checkpoint is that of step 40."),
        (40, [10, 20, 30, 40], 2, "The last good checkpoint is that of step 30."),
        (30, [10, 20, 30, 40], 2, "No checkpoint from before it stands."),  # those of steps 10 and 20 are gone
        (7, [], 2, "No checkpoint from before it stands."),
    ],
)
def test_the_last_good_checkpoint_is_told(since: int, saved: list[int], keep: int, told: Any) -> None:
    assert say_checkpoint(since, saved, keep) == told
