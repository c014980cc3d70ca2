"""From a spec to the things a loop needs. The one place of the child that reads the whole JobSpec.

Order matters where chance is drawn: seed, base, adapter; a checkpoint restores what came after. Walk of a job: after the
child has read its run.json, before the first step.
"""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from core.adapter import BaseIdentity
from core.data.pictures.cache import PictureCache
from core.data.tokenizer import NewToken, Tokenizer
from core.data.tokens import TokenCache
from core.errors import BadSpec
from core.eval.evaluate import evaluate
from core.eval.layout import Layout, Padded
from core.eval.rows import Example, MicroBatch
from core.events import Warned
from core.models.adapt import attach_adapter
from core.models.fp8 import rows_unrounded
from core.models.load import load_base, pick_device, quantization_name, resolve_precision
from core.models.vocabulary import extend_vocabulary, install_rows
from core.run import RunInput, TokenCacheRef
from core.spec import FullTuning, JobSpec, LoraTuning, MoraTuning, Objective, ProjectionTuning, ScheduleSpec, with_rows_at_once
from core.train.batches import Rows, TrainingRows, WeightedRows
from core.train.contrast import Contrast
from core.train.device import make_accelerator, out_of_memory_named, seed_everything
from core.train.fused.elementwise import PLAIN, Elementwise
from core.train.fused.install import (
    forget_graphs,
    install_fused,
    install_graphs,
    uninstall_fused,
    uninstall_graphs,
    weights_changed,
)
from core.train.losses import LOSSES, ExampleLosses, Loss, sequence_nats
from core.train.optim import build_optimizer
from core.train.pairs import PairChunks, PairRows
from core.train.selection import Selection
from core.train.tier import (
    Choice,
    PackingMismatch,
    Probe,
    assert_agreement,
    assert_rounding_is_bearable,
    choose_tier,
    enter_packed,
    layout_of,
    measure,
    restored_on_failure,
    rounded_otherwise,
)
from core.train.two_towers import build_contrast
from core.train.watchdog import Watchdog
from core.vision.contrastive import hold_log_scale

_EXAMPLE_TOKENS = 256
_PROBED_EXAMPLES = 4
_NAMED_TOKENS = 10


@dataclass(frozen=True)
class LaidOut:
    """A step's examples as micro-batches on the device."""

    step: int
    layout: Layout
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


def build_training(run: RunInput) -> Training:
    """Load, adapt and set up. Raises BadSpec, BadData, NoTrainableTokens, CudaOutOfMemory."""
    with out_of_memory_named(pick_device(run.device)):
        try:
            return _build(run)
        except PackingMismatch as mismatch:
            reason = f"the packed tier disagreed with the plain one: {mismatch}"
        # From the beginning: a model that kernels were swapped into is not the reference it would now have to be. Outside
        # the except block, whose traceback holds that model, and it is a web of cycles: two would not fit.
        gc.collect()
        training = _build(run, plain_because=reason)
    training.warnings.append(Warned(code="packing_mismatch", message=reason))
    return training


def _build(run: RunInput, plain_because: str | None = None) -> Training:
    spec = run.spec if run.rows_at_once is None else with_rows_at_once(run.spec, run.rows_at_once)
    device = pick_device(run.device)
    caches = [WeightedRows(_opened(ref), ref.weight) for ref in run.token_caches]
    rows = TrainingRows(caches, eval_rows=spec.data.eval_rows, batch=spec.batch, seed=spec.seed)
    total_steps = rows.total_steps(spec.schedule)
    seed_everything(spec.seed, device)
    base_model, base = _load(run, device)
    tokenizer = Tokenizer.from_folder(run.model_folder, spec.data.new_tokens)
    if tokenizer.new:
        extend_vocabulary(base_model, {token.id: token.pieces for token in tokenizer.new})
    is_text = spec.task == "causal_lm"
    two_towers = Choice("plain", "two towers, as they are")
    choice = choose_tier(spec, base_model.config, device, base.compute_dtype) if is_text else two_towers
    if plain_because is not None:
        choice = Choice("plain", plain_because)
    accelerator = make_accelerator(device, base.compute_dtype)
    contrast = None
    if is_text:
        if LOSSES[spec.objective.kind].needs_reference:
            _measure_references(base_model, rows, spec, device, accelerator)
        model = _tuned(base_model, spec, tokenizer.new)
    else:
        compute = accelerator.autocast
        model, contrast = build_contrast(base_model, spec, run.model_folder, tokenizer, rows, device, compute)
    if spec.memory.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise BadSpec(f"memory.checkpointing: the code of {spec.base_model} does not offer it")
        if spec.memory.checkpointing_offload and device.type != "cuda":
            raise BadSpec("memory.checkpointing_offload: only offered on a GPU: here everything is in the computer's memory")
        # The re-entrant kind gives frozen bases no gradient at all, and says nothing.
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False},
            every_n_layers=spec.memory.checkpointing_every,
            offload=spec.memory.checkpointing_offload,
        )
        # That made the embedding's result ask for a gradient, as the re-entrant kind needs it: it would be held for that, too.
        model.disable_input_require_grads()
    model.train()
    lora_plus_ratio = spec.tuning.lora_plus_ratio if isinstance(spec.tuning, LoraTuning) else None
    training = Training(
        model=model,
        base=base,
        tokenizer=tokenizer,
        device=device,
        accelerator=accelerator,
        optimizer=accelerator.prepare_optimizer(build_optimizer(model.named_parameters(), spec.optim, device, lora_plus_ratio)),
        rows=rows,
        objective=spec.objective,
        schedule=spec.schedule,
        total_steps=total_steps,
        learning_rate=spec.optim.learning_rate,
        max_grad_norm=spec.optim.max_grad_norm,
        choice=choice,
        layout=layout_of(spec, choice.tier) if is_text else PairChunks(spec.batch.rows_at_once),
        watchdog=Watchdog(spec.objective, rows_differ=rows.distinct_rows > rows.rows_per_step),
        selection=Selection(spec.eval.metric, keep_best=spec.eval.keep_best, early_stopping=spec.eval.early_stopping),
        warnings=[*_warnings(spec, device, total_steps), *_unused_tokens(tokenizer.new, rows)],
        contrast=contrast,
    )
    if contrast is not None and contrast.log_scale.requires_grad:
        log_scale = contrast.log_scale
        training.optimizer.optimizer.register_step_post_hook(lambda *_: hold_log_scale(log_scale))
    if choice.tier == "packed":
        _enter_packed(training, spec)
    if spec.memory.compile:
        _compile_layers(training)
    return training


def lay_out(training: Training, step: int) -> LaidOut:
    examples, layout = training.rows.step_rows(step), training.layout
    batches = [layout.collate(part, training.device) for part in layout.split(examples)]
    return LaidOut(step, layout, examples, batches)


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


def _opened(ref: TokenCacheRef) -> Rows:
    tokens = TokenCache.open(ref.folder)
    return tokens if ref.pictures is None else PairRows(tokens, PictureCache.open(ref.pictures))


def _load(run: RunInput, device: torch.device) -> tuple[Any, BaseIdentity]:
    spec = run.spec
    precision = resolve_precision(spec.memory.precision, device)
    is_full = isinstance(spec.tuning, FullTuning | ProjectionTuning)
    loaded = load_base(
        run.model_folder,
        name=spec.base_model,
        weights=run.model_weights,
        quantization=quantization_name(spec.quantization),
        # Weights that train are kept in fp32: a step of 1e-5 is lost in bf16. Autocast still multiplies in `precision`.
        precision="fp32" if is_full else precision,
        device=device,
        allow_remote_code=run.allow_remote_code,
        task=spec.task,
    )
    return loaded.model, loaded.identity.model_copy(update={"compute_dtype": precision})


def _tuned(base_model: Any, spec: JobSpec, new_tokens: Sequence[NewToken]) -> Any:
    if isinstance(spec.tuning, FullTuning):
        base_model.requires_grad_(True)
        return base_model
    assert isinstance(spec.tuning, LoraTuning | MoraTuning)
    adapted = attach_adapter(base_model, spec.tuning, spec.base_model)
    if new_tokens and not (isinstance(spec.tuning, LoraTuning) and spec.tuning.train_embeddings):
        install_rows(adapted.get_base_model(), new_tokens[0].id, len(new_tokens))
    return adapted


def _measure_references(model: Any, rows: TrainingRows, spec: JobSpec, device: torch.device, accelerator: Accelerator) -> None:
    """What the base says of every pair before anything of it is trained or adapted: once, instead of in every step."""
    layout = layout_of(spec, "plain")

    def summed(model: Any, batch: MicroBatch) -> ExampleLosses:
        return ExampleLosses(sequence_nats(model, batch), torch.ones(batch.sequences), {})

    def measure_all(examples: list[Example]) -> list[tuple[float, ...]]:
        singles = [Example((row,)) for example in examples for row in example.sequences]
        found = evaluate(model, singles, loss=summed, layout=layout, device=device, compute=accelerator.autocast)
        values = [-total for total, _ in found.losses]
        width = len(examples[0].sequences)
        return [tuple(values[i : i + width]) for i in range(0, len(values), width)]

    rows.measure_references(measure_all)


def _enter_packed(training: Training, spec: JobSpec) -> None:
    """Switch to the packed tier after a few of the run's rows have gone through both. Raises PackingMismatch."""
    examples = training.rows.step_rows(1)[:_PROBED_EXAMPLES]

    def measured(layout: Layout) -> Probe:
        with training.adapters_uncast():
            return measure(training.model, examples, layout, loss=training.loss, device=training.device, compute=training.compute)

    with restored_on_failure(training.model), rows_unrounded(training.model):
        one_by_one = Padded(1)  # the plain tier keeps more of a token than any other, and must not decide the run's peak
        plain = measured(one_by_one)
        with rounded_otherwise(training.model, training.device, training.base.compute_dtype):
            again = measured(one_by_one)
        done = enter_packed(training.model, training.device, with_liger=not spec.memory.compile)
        packed = measured(layout_of(spec, "packed"))
        said = assert_agreement(plain, again, packed, "packed", training.base.compute_dtype)
    training.choice = Choice("packed", f"{done}; on the first rows {said}")
    if spec.memory.fused_layers:
        _enter_fused(training, spec, lambda: measured(layout_of(spec, "fused")), plain, again)
    if training.base.quantization == "fp8":
        forget_graphs(training.model)
        rounding = assert_rounding_is_bearable(plain, measured(layout_of(spec, training.choice.tier)))
        training.choice = Choice(training.choice.tier, f"{training.choice.reason}; {rounding}")


def _enter_fused(training: Training, spec: JobSpec, measured: Callable[[], Probe], plain: Probe, again: Probe) -> None:
    """From the packed tier on to fused layers, which are held to the plain tier too; a disagreement is said and undone."""
    try:
        ops = _fused_ops(training.device)
        done = install_fused(training.model, ops, offload=spec.memory.checkpointing_offload)
        training.optimizer.optimizer.register_step_post_hook(lambda *_: weights_changed(training.model))
    except ValueError as error:
        raise BadSpec(f"memory.fused_layers: {error}") from error
    if training.device.type == "cuda":
        torch.cuda.empty_cache()  # what was joined lay in pieces too small for what comes
    try:
        with rows_unrounded(training.model):
            probe, how = _measured_as_graphs(training, measured) if training.device.type == "cuda" else (measured(), "")
        said = assert_agreement(plain, again, probe, "fused", training.base.compute_dtype)
    except PackingMismatch as mismatch:
        uninstall_fused(training.model)
        message = f"the fused layers disagreed with the plain tier, the packed one takes their place: {mismatch}"
        training.warnings.append(Warned(code="fused_mismatch", message=message))
        return
    training.choice = Choice("fused", f"{done}{how}; on the first rows {said}")


def _measured_as_graphs(training: Training, measured: Callable[[], Probe]) -> tuple[Probe, str]:
    """(what was measured, in words how): as graphs if these layers can be recorded, else kernel by kernel."""
    try:
        install_graphs(training.model)
        return measured(), ", started as graphs"
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:  # what torch and CUDA raise where something can't be recorded
        first: BaseException = error
        while first.__context__ is not None:  # ending a recording that failed fails too
            first = first.__context__
        reason = str(first).splitlines()[0]
    uninstall_graphs(training.model)
    training.optimizer.zero_grad()
    return measured(), f", started one by one ({reason})"


def _fused_ops(device: torch.device) -> Elementwise:
    if device.type != "cuda":
        return PLAIN
    from core.train.fused.gpu import ON_GPU  # Triton comes with torch for a GPU, and with no other

    return ON_GPU


def _compile_layers(training: Training) -> None:
    if training.device.type != "cuda":
        raise BadSpec("memory.compile: only offered on a GPU")
    model = training.model.get_base_model() if isinstance(training.model, PeftModel) else training.model
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise BadSpec("memory.compile: this model does not say which of its modules are layers")
    for layer in layers:
        layer.compile(dynamic=True)


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


def _unused_tokens(new_tokens: Sequence[NewToken], rows: TrainingRows) -> list[Warned]:
    if not new_tokens:
        return []
    used = rows.ids_from(new_tokens[0].id)
    unused = [repr(token.text) for token in new_tokens if token.id not in used]
    if not unused:
        return []
    named = ", ".join(unused[:_NAMED_TOKENS]) + (", ..." if len(unused) > _NAMED_TOKENS else "")
    message = f"data.new_tokens: no row holds {named}: nothing is learned about {'it' if len(unused) == 1 else 'them'}"
    return [Warned(code="new_tokens_unused", message=message)]
