"""The watchdog: ends a run that can come to nothing, long before its last step, and says why.

It is told two numbers per step and knows three ways to be doomed: a loss of exactly 0, a gradient that has exploded, a loss
that does not move. NaN and infinity are found where they arise, in the loop. A false alarm costs a user a good run, so each
rule waits for several steps in a row and stays silent where a healthy run may look the same; the rules say how.

What it remembers goes into the checkpoint, so that a resumed run ends at the step at which an uninterrupted one would.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from core.errors import GradientExploded, LossIsZero, LossStuck
from core.spec import DpoObjective, InfoNceObjective, Objective

ZERO_STEPS = 3
LEARNED_BY_HEART = 1e-3
"""Nats. A loss that was once this small and above 0 has come down to its 0 by learning."""

WINDOW = 50
FEWEST_NORMS = 10
EXPLODED_STEPS = 5
TIMES_MEDIAN = 1000.0
TIMES_LARGE = 10.0
SMALLEST_EXPLOSION = 10.0
STUCK_SPREAD = 1e-6
IDLE_STEPS = 10


class Watchdog:
    """Judges a run by loss and gradient norm of each step.

    `rows_differ`: there are more distinct rows than one step takes, so that consecutive steps see different ones.
    """

    def __init__(self, objective: Objective, *, rows_differ: bool) -> None:
        # A hinge is 0 as soon as every pair of a step is told apart well enough. That is success.
        # So is a step of pairs that all share one picture or caption, which has nothing to tell apart.
        self._zero_is_reachable = isinstance(objective, InfoNceObjective) or (
            isinstance(objective, DpoObjective) and objective.loss == "hinge"
        )
        # DPO's loss is one constant (ln 2, 1 or 1/4β²) on every row until policy and reference part, which a long warm-up delays.
        self._loss_tells_rows_apart = rows_differ and not isinstance(objective, DpoObjective)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)  # above 0, and none that was called an explosion
        self._smallest: float | None = None  # loss above 0
        self._zeros = 0  # in a row
        self._exploded = 0  # in a row
        self._idle = 0  # in a row

    def see(self, step: int, loss: float, grad_norm: float) -> None:
        """Look at a step that was taken; `grad_norm` is the norm before clipping. Raises a Doomed."""
        self._losses.append(loss)
        if loss > 0 and (self._smallest is None or loss < self._smallest):
            self._smallest = loss
        self._see_zero(step, loss, grad_norm)
        self._see_explosion(step, loss, grad_norm)
        self._see_idleness(step, loss, grad_norm)
        self._see_stillness(step, grad_norm)

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "smallest": self._smallest,
            "zeros": self._zeros,
            "exploded": self._exploded,
            "idle": self._idle,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], WINDOW)
        self._norms = deque(state["norms"], WINDOW)
        self._smallest = state["smallest"]
        self._zeros = state["zeros"]
        self._exploded = state["exploded"]
        self._idle = state["idle"]

    @property
    def _is_learned_by_heart(self) -> bool:
        return self._smallest is not None and self._smallest < LEARNED_BY_HEART

    def _see_zero(self, step: int, loss: float, grad_norm: float) -> None:
        """No model is certain of every token to the last bit; a loss of 0 means that none was compared.

        But for a few rows learned by heart: there the loss was tiny before it was 0.
        """
        self._zeros = self._zeros + 1 if loss == 0 else 0
        if self._zeros < ZERO_STEPS or self._zero_is_reachable or self._is_learned_by_heart:
            return
        since = step - self._zeros + 1
        raise LossIsZero(f"steps {since} to {step}: the loss was exactly 0 (gradient's norm {grad_norm:.3g})", since)

    def _see_explosion(self, step: int, loss: float, grad_norm: float) -> None:
        """The norm is far above the usual one, and far above the large ones too, for several steps in a row.

        One bad row makes a spike of one step. Rows of two kinds, most of them learned and some not (preferences above all),
        make norms of two sizes, and a median near 0: hence the large ones. The last term is for runs that have learned all
        they can, where every norm is next to nothing. Norms of 0 say nothing about size, and an explosion's own norms are
        left out, lest it become what is usual. The first steps of a run are only listened to.
        """
        if len(self._norms) >= FEWEST_NORMS:
            usual = statistics.median(self._norms)
            large = statistics.quantiles(self._norms, n=10, method="inclusive")[-1]
            if grad_norm > max(TIMES_MEDIAN * usual, TIMES_LARGE * large, SMALLEST_EXPLOSION):
                self._exploded += 1
                if self._exploded < EXPLODED_STEPS:
                    return
                since = step - self._exploded + 1
                raise GradientExploded(
                    f"steps {since} to {step}: the gradient's norm, {grad_norm:.3g} by now, was over {TIMES_MEDIAN:.0f} times "
                    f"its median of {usual:.3g} (loss {loss:.4g})",
                    since,
                )
        self._exploded = 0
        if grad_norm > 0:
            self._norms.append(grad_norm)

    def _see_idleness(self, step: int, loss: float, grad_norm: float) -> None:
        """There is a loss, and not one bit of a gradient: no weight moves."""
        self._idle = self._idle + 1 if loss > 0 and grad_norm == 0 else 0
        if self._idle < IDLE_STEPS or self._is_learned_by_heart:
            return
        since = step - self._idle + 1
        raise LossStuck(f"steps {since} to {step}: the gradient was exactly 0 at a loss of {loss:.4g}", since)

    def _see_stillness(self, step: int, grad_norm: float) -> None:
        """Losses of different rows differ by percents in any model that reads its input; here they don't in the sixth digit.

        The same rows over and over may well have one loss: when it can fall no further, or the learning rate has run out.
        """
        if not self._loss_tells_rows_apart or len(self._losses) < WINDOW or self._is_learned_by_heart:
            return
        low, high = min(self._losses), max(self._losses)
        if high - low > STUCK_SPREAD * abs(high):
            return
        since = step - WINDOW + 1
        raise LossStuck(
            f"steps {since} to {step}: the loss stayed at {high:.7g} over different rows (gradient's norm {grad_norm:.3g})", since
        )


def say_checkpoint(since: int, saved: Sequence[int], keep: int) -> str:
    """A sentence for the end of a message: the last checkpoint from before step `since`.

    `saved` are the steps of the run's checkpoints, oldest first, the one it was resumed from included; of these the newest
    `keep` stand.
    """
    good = [step for step in saved[-keep:] if step < since]
    return f"The last good checkpoint is that of step {good[-1]}." if good else "No checkpoint from before it stands."
