"""What a job would do, before anything is queued: can it be, how many steps, how much memory, and what looks unwise.

Pure arithmetic over the spec, the model's config and the counts that the preparer stored; no weight, token or device is
touched. The control plane asks it for `POST /jobs` (check_spec) and `POST /jobs/plan` (both). The memory is an estimate in
closed form: it counts what a step holds at its peak and knows nothing of fragmentation or the CUDA context.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.catalog import FAMILIES
from core.errors import Problem
from core.records import MemoryEstimate, PlanRecord, TokenCounts
from core.spec import FullTuning, JobSpec, LoraTuning, Nf4Quantization, ScheduleSpec

GIB = 1 << 30
_LOGITS_AT_ONCE = 1 << 26
"""The head is applied in chunks of so many logits (core.eval.nats)."""

_OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256}
"""Two states per trained parameter: fp32, or one byte each and an fp32 scale per block of 256 (arXiv 2110.02861)."""

_NF4_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Four bits, and a scale per block of 64: fp32, or quantised itself in blocks of 256 (arXiv 2305.14314)."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that decide its memory."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]
    """Leaf name -> (inputs, outputs) of the linear modules in every layer."""


def check_spec(spec: JobSpec, *, architecture: str, context_length: int) -> list[Problem]:
    """Every reason why this model can't do what the spec asks; empty when it can. Ranges are the spec's own business."""
    problems = []
    if spec.data.max_length > context_length:
        message = f"{spec.base_model} reads at most {context_length} tokens, not {spec.data.max_length}"
        problems.append(Problem("max-length-exceeds-context", message, pointer="/data/max_length"))
    if isinstance(spec.tuning, LoraTuning) and spec.tuning.target_modules != "all-linear":
        known = FAMILIES[architecture].linear_modules
        if not spec.tuning.target_modules:
            message = f"name at least one of: {', '.join(known)}"
            problems.append(Problem("no-target-modules", message, pointer="/tuning/target_modules"))
        for number, name in enumerate(spec.tuning.target_modules):
            if name not in known:
                message = f"{spec.base_model} has no linear module {name}; it has: {', '.join(known)}"
                problems.append(Problem("unknown-target-module", message, pointer=f"/tuning/target_modules/{number}"))
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
    trainable = trainable_parameters(spec, shape, parameters)
    train_rows = eval_rows = steps = None
    if counts is not None:
        usable = [c.rows - c.rows_without_target for c in counts]
        eval_rows = min(spec.data.eval_rows, sum(usable))
        train_rows = sum(usable) - eval_rows
        steps = _steps(spec, counts, eval_rows) if train_rows else 0
    longest = spec.data.max_length if counts is None else min(spec.data.max_length, max(c.longest for c in counts))
    memory = estimate_memory(spec, shape, parameters, trainable, spec.batch.micro_batch_size * longest)
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
    """Read the shape of a decoder out of its config.json."""
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
    }
    linear = {name: sizes[name] for name in FAMILIES[architecture].linear_modules}
    return ModelShape(hidden, intermediate, config["num_hidden_layers"], config["vocab_size"], linear)


def trainable_parameters(spec: JobSpec, shape: ModelShape, parameters: int) -> int:
    """All of them, or rank · (inputs + outputs) for each module LoRA stands on."""
    if isinstance(spec.tuning, FullTuning):
        return parameters
    wanted = spec.tuning.target_modules
    names = shape.linear if wanted == "all-linear" else dict.fromkeys(wanted)
    return shape.layers * spec.tuning.rank * sum(sum(shape.linear[name]) for name in names)


def estimate_memory(spec: JobSpec, shape: ModelShape, parameters: int, trainable: int, tokens: int) -> MemoryEstimate:
    """GiB at the peak of a step with `tokens` tokens in a micro-batch. `auto` precision counts as bf16."""
    size = 4 if spec.memory.precision == "fp32" else 2
    linear = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linear.values())
    largest = max(inputs * outputs for inputs, outputs in shape.linear.values())
    scratch = 0.0
    if isinstance(spec.tuning, FullTuning):
        # Weights that train are fp32; autocast holds a copy of the linear ones in the compute dtype through the step.
        weights = 4.0 * parameters + (size * linear if size < 4 else 0)
    elif isinstance(spec.quantization, Nf4Quantization):
        # Embeddings, norms and head are not quantised; one linear at a time is unpacked to be multiplied with.
        weights = _NF4_BYTES[spec.quantization.double_quantization] * linear + size * (parameters - linear) + 4.0 * trainable
        scratch = size * largest
    else:
        weights = size * parameters + 4.0 * trainable
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


def _steps(spec: JobSpec, counts: list[TokenCounts], eval_rows: int) -> int:
    weights = {ref.dataset_id: ref.weight for ref in spec.data.datasets}
    usable = {c.dataset_id: c.rows - c.rows_without_target for c in counts}
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
    elif isinstance(spec.quantization, Nf4Quantization):
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
