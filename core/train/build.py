"""From a spec to the things a loop needs. The one place of the child that reads the whole JobSpec.

Order matters where chance is drawn: seed, base, adapter; a checkpoint restores what came after. Walk of a job: after the
child has read its run.json, before the first step.
"""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from core.adapter import BaseIdentity
from core.data.pictures.cache import PictureCache
from core.data.tokenizer import NewToken, Tokenizer
from core.data.tokens import TokenCache
from core.errors import BadSpec
from core.eval.evaluate import evaluate
from core.eval.rows import Example, MicroBatch
from core.events import Warned
from core.models.adapt import attach_adapter
from core.models.load import load_base, pick_device, quantization_name, resolve_precision
from core.models.vocabulary import extend_vocabulary, install_rows
from core.run import RunInput, TokenCacheRef
from core.spec import FullTuning, JobSpec, LoraTuning, MoraTuning, ProjectionTuning, with_rows_at_once
from core.train.batches import Rows, TrainingRows, WeightedRows
from core.train.device import make_accelerator, out_of_memory_named, seed_everything
from core.train.enter import compile_layers, enter_packed_tier
from core.train.losses import LOSSES, ExampleLosses, sequence_nats
from core.train.optim import build_optimizer
from core.train.pairs import PairChunks, PairRows
from core.train.selection import Selection
from core.train.tier import (
    Choice,
    PackingMismatch,
    choose_tier,
    layout_of,
)
from core.train.training import Training
from core.train.two_towers import build_contrast
from core.train.watchdog import Watchdog
from core.vision.contrastive import hold_log_scale

_NAMED_TOKENS = 10


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
        enter_packed_tier(training, spec)
    if spec.memory.compile:
        compile_layers(training)
    return training


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
