"""A run in memory: what the loop steps through, and what of it is asked for elsewhere."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from core.adapter import BaseIdentity
from core.data.tokenizer import Tokenizer
from core.eval.layout import Layout
from core.eval.rows import Example, MicroBatch
from core.events import Warned
from core.spec import Objective, ScheduleSpec
from core.train.batches import TrainingRows
from core.train.contrast import Contrast
from core.train.losses import LOSSES, ExampleLosses, Loss
from core.train.selection import Selection
from core.train.tier import Choice
from core.train.watchdog import Watchdog

_EXAMPLE_TOKENS = 256


@dataclass(frozen=True)
class LaidOut:
    """A step's examples as micro-batches on the device."""

    step: int
    examples: list[Example]
    batches: list[Any]  # MicroBatch, or PairBatch


@dataclass
class Training:
    """A run in memory, at the step it begins with."""

    model: Any
    base: BaseIdentity
    tokenizer: Tokenizer
    device: torch.device
    accelerator: Accelerator
    optimizer: Any
    rows: TrainingRows
    objective: Objective
    schedule: ScheduleSpec
    total_steps: int
    learning_rate: float
    max_grad_norm: float
    choice: Choice
    layout: Layout
    watchdog: Watchdog
    selection: Selection
    warnings: list[Warned]
    contrast: Contrast | None = None
    """Where pairs are trained, by whole steps; `loss` has no say then."""
    has_halved: bool = False
    """The GPU's memory was too small for the layout once; there is no second time."""
    ahead: LaidOut | None = None
    """A step that was laid out before its time."""

    @property
    def kind(self) -> Loss:
        return LOSSES[self.objective.kind]

    def loss(self, model: Any, batch: MicroBatch) -> ExampleLosses:
        return self.kind.function(model, batch, self.objective)

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self._trainable

    @cached_property  # walking a model's modules takes longer than what a fused step of a few rows leaves to the host
    def _trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def drop_optimizer(self) -> None:
        """Free gradients and optimizer state: no step follows."""
        self.optimizer.zero_grad()
        self.optimizer.state.clear()

    def compute(self) -> AbstractContextManager[Any]:
        """The context of one forward pass: autocast to the compute dtype."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def adapters_uncast(self) -> AbstractContextManager[Any]:
        """Around passes forward and backward: fp32 adapters take inputs as they come.

        Autocast casts for the matrix product alone; peft's own cast would keep an fp32 copy of every input. It spans the
        backward pass because a recomputed layer must do there what it did the first time.
        """
        if isinstance(self.model, PeftModel) and self.base.compute_dtype != "fp32":
            context: AbstractContextManager[Any] = disable_input_dtype_casting(self.model)
            return context
        return nullcontext()


def lay_out(training: Training, step: int) -> LaidOut:
    """Step `step` as the layout of now cuts it."""
    examples, layout = training.rows.step_rows(step), training.layout
    return LaidOut(step, examples, [layout.collate(part, training.device) for part in layout.split(examples)])


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all); a 4-bit weight counts as what it stands for, not as its packed bytes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel() for p in model.parameters())
    return trainable, total


def render_example(tokenizer: Tokenizer, rows: TrainingRows) -> list[tuple[str, bool]]:
    """The start of the first row as it is trained: decoded pieces and whether they carry loss."""
    ids, mask = (part[:_EXAMPLE_TOKENS].tolist() for part in rows.first_row().sequences[0])
    pieces: list[tuple[list[int], bool]] = []
    for token, trained in zip(ids, mask, strict=True):
        if not pieces or pieces[-1][1] != bool(trained):
            pieces.append(([], bool(trained)))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(tokens, skip_special=False), trained) for tokens, trained in pieces]
