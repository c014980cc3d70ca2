"""Which evaluation was the best, whether another one is worth waiting for, and the weights of the best.

The loop asks after every evaluation, the one before training included: a run that only makes a model worse hands over the
model as it was, if it is to hand over the best. State and weights go into the checkpoint, so a resumed run decides as an
uninterrupted one would.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from core.errors import ArtifactError
from core.events import Evaluation
from core.spec import EarlyStopping, EvalMetric


@dataclass(frozen=True)
class Verdict:
    is_best: bool  # better than every evaluation before it; of equals the first stays the best
    should_stop: bool


@dataclass(frozen=True)
class Best:
    step: int
    value: float  # of the metric
    eval_loss: float


class Selection:
    """Judges evaluations by one metric: a loss is good when low, everything else when high."""

    def __init__(self, metric: EvalMetric, *, keep_best: bool, early_stopping: EarlyStopping | None) -> None:
        self.metric = metric
        self.keep_best = keep_best
        self._early_stopping = early_stopping
        self._sign = -1.0 if metric == "eval_loss" else 1.0
        self.best: Best | None = None
        self._judged = -1  # last step
        self._mark = 0.0  # the value that the next progress is counted from
        self._waited = 0  # evaluations since then
        self._weights: dict[str, torch.Tensor] = {}  # on the CPU

    @property
    def should_stop(self) -> bool:
        """True once `patience` evaluations in a row were no progress. To be asked before the first step of a resume, too."""
        return self._early_stopping is not None and self._waited >= self._early_stopping.patience

    def judge(self, step: int, evaluation: Evaluation) -> Verdict:
        """Raises ValueError when the metric was not measured. A step judged before gets its verdict again."""
        value = getattr(evaluation, self.metric)
        if value is None:
            raise ValueError(f"the evaluation after step {step} has no {self.metric}")
        if step > self._judged:
            self._judged = step
            self._count(value)
            if self.best is None or self._gain(value, self.best.value) > 0:
                self.best = Best(step, value, evaluation.eval_loss)
        return Verdict(self.best is not None and self.best.step == step, self.should_stop)

    def sentence(self, step: int) -> str:
        """How an early stop after `step` is told."""
        assert self.best is not None
        return (
            f"Training was stopped early, after step {step}: {self.metric} got no better in {self._waited} evaluations than "
            f"{self._mark:.4g}; the best was {self.best.value:.4g} after step {self.best.step}."
        )

    def remember(self, trainable: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        """Copy the trainable weights of the best evaluation into the computer's memory, in place of earlier ones."""
        for name, parameter in trainable:
            if name in self._weights:
                self._weights[name].copy_(parameter.detach())
            else:
                self._weights[name] = parameter.detach().to("cpu", copy=True)

    def put_back(self, trainable: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
        """The remembered weights into the model. Raises ArtifactError when they are of other parameters."""
        odd = sorted(set(self._weights) ^ {name for name, _ in trainable})
        if odd:
            raise ArtifactError(f"the best weights: {len(odd)} parameters on one side only, first {odd[0]}")
        with torch.no_grad():
            for name, parameter in trainable:
                parameter.copy_(self._weights[name])

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON; `tensors` are the other half."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "judged": self._judged, "mark": self._mark, "waited": self._waited}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = None if state["best"] is None else Best(**state["best"])
        self._judged = state["judged"]
        self._mark = state["mark"]
        self._waited = state["waited"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The remembered weights by parameter name, on the CPU; empty when there are none."""
        return self._weights

    def restore_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self._weights = dict(tensors)

    def _count(self, value: float) -> None:
        # Progress is counted from the last progress, not from the last value: small steps add up.
        needed = 0.0 if self._early_stopping is None else self._early_stopping.min_delta
        gain = self._gain(value, self._mark)
        if self.best is None or (gain > 0 and gain >= needed):
            self._mark, self._waited = value, 0
        else:
            self._waited += 1

    def _gain(self, value: float, over: float) -> float:
        return self._sign * (value - over)
