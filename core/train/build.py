"""From a spec to the things a loop needs. The one place of the child that reads the whole JobSpec.

Order matters where chance is drawn: seed, base, adapter; a checkpoint restores what came after. Walk of a job: after the
child has read its run.json, before the first step.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from core.adapter import BaseIdentity
from core.data.tokenizer import Tokenizer
from core.data.tokens import TokenCache
from core.eval.rows import MicroBatch
from core.events import Warned
from core.models.adapt import attach_lora
from core.models.load import Quantization, load_base, pick_device, resolve_precision
from core.run import RunInput
from core.spec import FullTuning, JobSpec, LoraTuning, Nf4Quantization, ScheduleSpec
from core.train.batches import TrainingRows, WeightedRows
from core.train.device import make_accelerator, seed_everything
from core.train.losses import LOSSES
from core.train.optim import build_optimizer

_EXAMPLE_TOKENS = 256

LossFunction = Callable[[Any, MicroBatch], tuple[torch.Tensor, int]]


@dataclass
class Training:
    """A run in memory, at the step it begins with."""

    model: Any
    base: BaseIdentity
    device: torch.device
    accelerator: Accelerator
    optimizer: Any
    rows: TrainingRows
    loss: LossFunction
    schedule: ScheduleSpec
    total_steps: int
    learning_rate: float
    max_grad_norm: float
    micro_batch_size: int
    warnings: list[Warned]

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
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


def build_training(run: RunInput) -> Training:
    """Load, adapt and set up. Raises BadSpec, BadData, NoTrainableTokens, CudaOutOfMemory."""
    spec = run.spec
    device = pick_device(run.device)
    caches = [WeightedRows(TokenCache.open(ref.folder), ref.weight) for ref in run.token_caches]
    rows = TrainingRows(caches, eval_rows=spec.data.eval_rows, batch=spec.batch, seed=spec.seed)
    total_steps = rows.total_steps(spec.schedule)
    seed_everything(spec.seed, device)
    model, base = _tuned_model(run, device)
    if spec.memory.checkpointing:
        # The re-entrant kind gives frozen bases no gradient at all, and says nothing.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    accelerator = make_accelerator(device, base.compute_dtype)
    optimizer = accelerator.prepare_optimizer(build_optimizer(model.named_parameters(), spec.optim, device))
    return Training(
        model=model,
        base=base,
        device=device,
        accelerator=accelerator,
        optimizer=optimizer,
        rows=rows,
        loss=partial(LOSSES[spec.objective.kind], objective=spec.objective),
        schedule=spec.schedule,
        total_steps=total_steps,
        learning_rate=spec.optim.learning_rate,
        max_grad_norm=spec.optim.max_grad_norm,
        micro_batch_size=spec.batch.micro_batch_size,
        warnings=_warnings(spec, device, total_steps),
    )


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all); a 4-bit weight counts as what it stands for, not as its packed bytes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel() for p in model.parameters())
    return trainable, total


def render_example(run: RunInput, rows: TrainingRows) -> list[tuple[str, bool]]:
    """The start of the first row as it is trained: decoded pieces and whether they carry loss."""
    tokenizer = Tokenizer.from_folder(run.model_folder)
    ids, mask = (part[:_EXAMPLE_TOKENS].tolist() for part in rows.first_row())
    pieces: list[tuple[list[int], bool]] = []
    for token, trained in zip(ids, mask, strict=True):
        if not pieces or pieces[-1][1] != bool(trained):
            pieces.append(([], bool(trained)))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(tokens, skip_special=False), trained) for tokens, trained in pieces]


def base_options(spec: JobSpec) -> Quantization:
    """The quantisation by the name an identity uses."""
    if isinstance(spec.quantization, Nf4Quantization):
        return "nf4-double" if spec.quantization.double_quantization else "nf4"
    return "none"


def _tuned_model(run: RunInput, device: torch.device) -> tuple[Any, BaseIdentity]:
    spec = run.spec
    precision = resolve_precision(spec.memory.precision, device)
    is_full = isinstance(spec.tuning, FullTuning)
    loaded = load_base(
        run.model_folder,
        name=spec.base_model,
        weights=run.model_weights,
        quantization=base_options(spec),
        # Weights that train are kept in fp32: a step of 1e-5 is lost in bf16. Autocast still multiplies in `precision`.
        precision="fp32" if is_full else precision,
        device=device,
    )
    if isinstance(spec.tuning, LoraTuning):
        return attach_lora(loaded.model, spec.tuning, spec.base_model), loaded.identity
    loaded.model.requires_grad_(True)
    return loaded.model, loaded.identity.model_copy(update={"compute_dtype": precision})


def _warnings(spec: JobSpec, device: torch.device, total_steps: int) -> list[Warned]:
    found = []
    if spec.optim.kind.startswith("paged_") and device.type == "cpu":
        found.append(Warned(code="optimizer_not_paged", message=f"{spec.optim.kind}: a CPU has no paged memory; runs unpaged"))
    if spec.schedule.warmup_steps >= total_steps:
        found.append(
            Warned(
                code="warmup_fills_run",
                message=f"schedule.warmup_steps ({spec.schedule.warmup_steps}) covers all {total_steps} steps",
            )
        )
    return found
