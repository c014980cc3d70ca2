"""What a job would do, before anything is queued: can it be, how many steps, how much memory, and what looks unwise.

Pure arithmetic over the spec, the model's config and the counts that the preparer stored; no weight, token or device is
touched. The control plane asks it for `POST /jobs` (check_spec) and `POST /jobs/plan` (both). The memory is an estimate in
closed form: it counts what a step holds at its peak and knows nothing of fragmentation or the CUDA context.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from core.catalog import FAMILIES, REMOTE_CODE, can_pack
from core.errors import Problem
from core.records import MemoryEstimate, PlanRecord, TokenCounts
from core.spec import (
    DATA_KINDS,
    Fp4Quantization,
    FullTuning,
    Int8Quantization,
    JobSpec,
    LoraTuning,
    MoraTuning,
    Nf4Quantization,
    Quantization,
    ScheduleSpec,
)
from core.tuning import Shapes, adapter_parameters, tuning_problems

GIB = 1 << 30
_LOGITS_AT_ONCE = 1 << 26
"""The head is applied in chunks of so many logits (core.eval.nats)."""

_OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256}
"""Two states per trained parameter: fp32, or one byte each and an fp32 scale per block of 256 (arXiv 2110.02861)."""

_4BIT_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Four bits, and a scale per block of 64: fp32, or quantised itself in blocks of 256 (arXiv 2305.14314)."""

_MLP_MODULES = frozenset({"gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1", "fc2"})


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that decide its memory."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]
    """Leaf name -> (inputs, outputs) of the linear modules in every layer."""
    tied_embeddings: bool = False
    """Input embedding and output head are one matrix."""


def check_spec(spec: JobSpec, *, architecture: str, context_length: int, config: dict[str, Any]) -> list[Problem]:
    """Every reason why this model can't do what the spec asks; empty when it can. Ranges are the spec's own business."""
    problems = []
    if spec.data.max_length > context_length:
        message = f"{spec.base_model} reads at most {context_length} tokens, not {spec.data.max_length}"
        problems.append(Problem("max-length-exceeds-context", message, pointer="/data/max_length"))
    if not isinstance(spec.tuning, FullTuning):
        shape = model_shape(architecture, config)
        unknown = _unknown_targets(spec.base_model, spec.tuning, list(shape.linear))
        problems += unknown
        if not unknown and architecture in FAMILIES:  # the paths of others are known to the child alone
            problems += tuning_problems(spec.tuning, _targets(shape, spec.tuning))
    elif architecture not in FAMILIES:
        message = f"{spec.base_model} brings its own code, which a fully tuned model would need beside it: use LoRA"
        problems.append(Problem("remote-code-full-tuning", message, pointer="/tuning/kind"))
    if spec.data.new_tokens and architecture not in FAMILIES:
        message = f"{spec.base_model} brings its own code, which a model with new tokens would need beside it"
        problems.append(Problem("remote-code-new-tokens", message, pointer="/data/new_tokens"))
    obstacle = can_pack(architecture, config, spec.data.max_length)
    if spec.batch.packing == "on" and obstacle is not None:
        problems.append(Problem("packing-impossible", f"{spec.base_model}: {obstacle}", pointer="/batch/packing"))
    if spec.eval.every_steps is not None and not spec.data.eval_rows:
        message = "there is nothing to evaluate on: set data.eval_rows"
        problems.append(Problem("no-eval-rows", message, pointer="/eval/every_steps"))
    seen = set()
    for number, ref in enumerate(spec.data.datasets):
        if ref.dataset_id in seen:
            message = "the dataset is named twice; use its weight instead"
            problems.append(Problem("duplicate-dataset", message, pointer=f"/data/datasets/{number}/dataset_id"))
        seen.add(ref.dataset_id)
    return problems


def plan(
    spec: JobSpec,
    *,
    architecture: str,
    parameters: int,
    config: dict[str, Any],
    counts: list[TokenCounts] | None,
    budget_gib: float | None,
) -> PlanRecord:
    """The dry run of a spec that `check_spec` has passed.

    `counts` are those of all the job's datasets, or None while they are not known. Steps are those of the engine as long as
    no held-out row has a twin: the engine takes equal rows out of training together, and a count does not know of them.
    """
    shape = model_shape(architecture, config)
    parameters += new_parameters(spec, shape)
    trainable = trainable_parameters(spec, shape, parameters)
    train_rows = eval_rows = steps = None
    if counts is not None:
        usable = sum(c.examples for c in counts)
        eval_rows = min(spec.data.eval_rows, usable)
        train_rows = usable - eval_rows
        steps = _steps(spec, counts, eval_rows) if train_rows else 0
    longest = spec.data.max_length if counts is None else min(spec.data.max_length, max(c.longest for c in counts))
    sequences = 2 if DATA_KINDS[spec.objective.kind] == "preference" else 1  # both answers of a pair are in memory at once
    memory = estimate_memory(spec, shape, parameters, trainable, spec.batch.micro_batch_size * sequences * longest)
    fits = None if budget_gib is None else memory.total_gib <= budget_gib
    return PlanRecord(
        ready=counts is not None,
        train_rows=train_rows,
        eval_rows=eval_rows,
        steps=steps,
        tokens=counts or [],
        trainable_parameters=trainable,
        memory=memory,
        budget_gib=budget_gib,
        fits=fits,
        warnings=list(_warnings(spec, counts, train_rows, steps, memory, budget_gib)),
    )


def count_steps(rows_per_epoch: int, rows_per_step: int, schedule: ScheduleSpec) -> int:
    """Optimizer steps of a job: an epoch ends with what rows are left, a fraction of one is rounded up to whole steps."""
    per_epoch = math.ceil(rows_per_epoch / rows_per_step)
    steps = max(1, math.ceil(schedule.epochs * per_epoch - 1e-9))  # 0.1 · 30 is a hair above 3
    return steps if schedule.max_steps is None else min(steps, schedule.max_steps)


def model_shape(architecture: str, config: dict[str, Any]) -> ModelShape:
    """Read the shape of a decoder out of its config.json, or out of what registration found stored of an unknown one."""
    if architecture not in FAMILIES:
        stored = config[REMOTE_CODE]["shape"]
        linear = {name: (inputs, outputs) for name, (inputs, outputs) in stored["linear"].items()}
        return ModelShape(stored["hidden"], stored["intermediate"], stored["layers"], stored["vocabulary"], linear)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "gate_up_proj": (hidden, 2 * intermediate),
        "down_proj": (intermediate, hidden),
        "qkv_proj": (hidden, queries + 2 * keys),
        "dense": (queries, hidden),
        "fc1": (hidden, intermediate),
        "fc2": (intermediate, hidden),
    }
    family = FAMILIES[architecture]
    linear = {name: sizes[name] for name in family.linear_modules}
    tied = config.get("tie_word_embeddings", family.tied_embeddings)
    return ModelShape(hidden, intermediate, config["num_hidden_layers"], config["vocab_size"], linear, tied)


def new_parameters(spec: JobSpec, shape: ModelShape) -> int:
    """Rows of embedding and head for the new tokens, as if the model had none to spare."""
    return (1 if shape.tied_embeddings else 2) * len(spec.data.new_tokens) * shape.hidden


def trainable_parameters(spec: JobSpec, shape: ModelShape, parameters: int) -> int:
    """All of them, new tokens' included; or those of the adapter, and those of embedding and head that train beside it."""
    if isinstance(spec.tuning, FullTuning):
        return parameters
    adapter = adapter_parameters(spec.tuning, _targets(shape, spec.tuning)) + new_parameters(spec, shape)
    if isinstance(spec.tuning, LoraTuning) and spec.tuning.train_embeddings:
        return adapter + (1 if shape.tied_embeddings else 2) * shape.vocabulary * shape.hidden
    return adapter


def estimate_memory(spec: JobSpec, shape: ModelShape, parameters: int, trainable: int, tokens: int) -> MemoryEstimate:
    """GiB at the peak of a step with `tokens` tokens in a micro-batch. `auto` precision counts as bf16."""
    size = 4 if spec.memory.precision == "fp32" else 2
    linear = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linear.values())
    largest = max(inputs * outputs for inputs, outputs in shape.linear.values())
    scratch = 0.0
    if isinstance(spec.tuning, FullTuning):
        # Weights that train are fp32; autocast holds a copy of the linear ones in the compute dtype through the step.
        weights = 4.0 * parameters + (size * linear if size < 4 else 0)
    else:
        # Embeddings, norms and head are not quantised; one linear at a time is unpacked to be multiplied with.
        packed = _packed_bytes(spec.quantization)
        weights = (size if packed is None else packed) * linear + size * (parameters - linear) + 4.0 * trainable
        scratch = 0.0 if packed is None else size * largest
        if isinstance(spec.tuning, LoraTuning) and spec.tuning.init != "default":
            weights += 4.0 * adapter_parameters(spec.tuning, _targets(shape, spec.tuning))  # where it began, kept beside it
    # Kept for the backward pass, per token and layer: residuals, norms (in fp32: counted twice), q, k, v and the attention's
    # output, about 8 hidden sizes; gate, up, their activation and product, 4 intermediate sizes. Measured engines with fused
    # kernels keep 5 and 3.
    layer = size * (8 * shape.hidden + 4 * shape.intermediate)
    kept = size * shape.hidden * shape.layers + layer if spec.memory.checkpointing else layer * shape.layers
    logits = min(tokens * shape.vocabulary, _LOGITS_AT_ONCE) * (size + 8)  # in compute dtype, in fp32, and their gradient
    parts = {
        "weights_gib": weights / GIB,
        "gradients_gib": 4.0 * trainable / GIB,
        "optimizer_gib": _OPTIMIZER_BYTES[spec.optim.kind] * trainable / GIB,
        "activations_gib": (tokens * kept + logits + scratch) / GIB,
    }
    return MemoryEstimate(**parts, total_gib=sum(parts.values()))


def _packed_bytes(quantization: Quantization) -> float | None:
    """Bytes per quantised weight; None where nothing is."""
    if isinstance(quantization, Nf4Quantization | Fp4Quantization):
        return _4BIT_BYTES[quantization.double_quantization]
    return 1.0 if isinstance(quantization, Int8Quantization) else None  # a scale per output is next to nothing


def _targets(shape: ModelShape, tuning: LoraTuning | MoraTuning) -> Shapes:
    """The adapted modules, by the paths they have in transformers' decoders."""
    wanted = list(shape.linear) if tuning.target_modules == "all-linear" else tuning.target_modules
    return {
        f"model.layers.{layer}.{'mlp' if name in _MLP_MODULES else 'self_attn'}.{name}": shape.linear[name]
        for layer in range(shape.layers)
        for name in wanted
        if name in shape.linear
    }


def _unknown_targets(model: str, tuning: LoraTuning | MoraTuning, known: Sequence[str]) -> list[Problem]:
    if tuning.target_modules == "all-linear":
        return []
    if not tuning.target_modules:
        return [Problem("no-target-modules", f"name at least one of: {', '.join(known)}", pointer="/tuning/target_modules")]
    return [
        Problem(
            "unknown-target-module",
            f"{model} has no linear module {name}; it has: {', '.join(known)}",
            pointer=f"/tuning/target_modules/{number}",
        )
        for number, name in enumerate(tuning.target_modules)
        if name not in known
    ]


def _steps(spec: JobSpec, counts: list[TokenCounts], eval_rows: int) -> int:
    weights = {ref.dataset_id: ref.weight for ref in spec.data.datasets}
    usable = {c.dataset_id: c.examples for c in counts}
    # Held-out rows are drawn from all datasets alike, so each gives its share.
    share = eval_rows / sum(usable.values())
    draws = [max(1, round(weights[d] * round(rows * (1 - share)))) for d, rows in usable.items() if round(rows * (1 - share))]
    rows_per_step = spec.batch.micro_batch_size * spec.batch.gradient_accumulation_steps
    return count_steps(sum(draws), rows_per_step, spec.schedule)


def _warnings(
    spec: JobSpec,
    counts: list[TokenCounts] | None,
    train_rows: int | None,
    steps: int | None,
    memory: MemoryEstimate,
    budget_gib: float | None,
) -> Iterator[str]:
    """What is possible and looks unwise. Ranges are those that practice recommends for instruction tuning."""
    rate = spec.optim.learning_rate
    if isinstance(spec.tuning, FullTuning):
        low, high, what = 1e-6, 1e-4, "full tuning"
    elif isinstance(spec.quantization, Nf4Quantization | Fp4Quantization):
        low, high, what = 2e-4, 5e-4, "QLoRA"
    else:
        low, high, what = 5e-5, 5e-4, "LoRA"
    if not low <= rate <= high:
        yield f"optim.learning_rate {rate:g} is outside {low:g} to {high:g}, the usual range of {what}"
    if isinstance(spec.tuning, LoraTuning):
        if not 4 <= spec.tuning.rank <= 16:
            yield f"tuning.rank {spec.tuning.rank} is outside the usual 4 to 16"
        if not 16 <= spec.tuning.alpha <= 64:
            yield f"tuning.alpha {spec.tuning.alpha:g} is outside the usual 16 to 64"
    rows_per_step = spec.batch.micro_batch_size * spec.batch.gradient_accumulation_steps
    if not 16 <= rows_per_step <= 64:
        yield f"{rows_per_step} rows per step (micro_batch_size × gradient_accumulation_steps) is outside the usual 16 to 64"
    for count in counts or []:
        if count.truncated_rows:
            cut = f"{count.truncated_rows} of {count.rows} rows are longer than data.max_length {spec.data.max_length}"
            yield f"{count.dataset_id}: {cut} and lose their end (the longest has {count.longest} tokens)"
        if count.rows_without_target:
            yield f"{count.dataset_id}: {count.rows_without_target} rows keep no token to train on and are dropped"
    if train_rows == 0:
        yield f"data.eval_rows {spec.data.eval_rows} leaves no row to train on: the job would fail"
    if steps and spec.schedule.warmup_steps >= steps:
        yield f"schedule.warmup_steps {spec.schedule.warmup_steps} covers all {steps} steps: the full learning rate comes last"
    if budget_gib is not None and memory.total_gib > budget_gib:
        yield (
            f"about {memory.total_gib:.1f} GiB are needed and the largest worker plans with {budget_gib:.1f}: lower "
            f"batch.micro_batch_size or data.max_length, set memory.checkpointing, or quantise"
        )
