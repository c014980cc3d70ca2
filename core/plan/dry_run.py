"""The dry run of a job: steps, tokens, memory, time, what would make it fit, and what looks unwise."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from core.plan.coefficients import find_gpu
from core.plan.knobs import Outlook, knobs_for, most_rows_at_once
from core.plan.memory import estimate_memory
from core.plan.refine import method_of, refined, refinement
from core.plan.time import step_seconds
from core.plan.work import Work, steps_of, work_of
from core.records import Knob, MemoryEstimate, PlanRecord, TokenCounts
from core.spec import Fp4Quantization, FullTuning, JobSpec, LoraTuning, Nf4Quantization, with_rows_at_once

_WAYS = 3


def plan(
    spec: JobSpec,
    *,
    architecture: str,
    parameters: int,
    config: dict[str, Any],
    counts: list[TokenCounts] | None,
    budget_gib: float | None,
    gpu: str | None = None,
    measured: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> PlanRecord:
    """The dry run of a spec that `check_spec` has passed.

    `counts` are those of all the job's datasets, or None while they are not known: rows count as long as they may be then.
    `gpu` is a device's name, `measured` what finished runs of the model said of their plans there: by `method_of`, the newest
    first, what `ratio_of` gives. Steps are those of the engine as long as no held-out row has a twin: the engine takes equal rows
    out of training together, and a count does not know of them.
    """
    train_rows = eval_rows = steps = None
    if counts is not None:
        usable = sum(c.examples for c in counts)
        eval_rows = min(spec.data.eval_rows, usable)
        train_rows = usable - eval_rows
        steps = steps_of(spec, counts, eval_rows) if train_rows else 0
    if spec.task == "contrastive":
        return _without_estimate(spec, counts, budget_gib)
    kind = find_gpu(gpu)

    def work(of: JobSpec) -> Work:
        return work_of(of, architecture=architecture, parameters=parameters, config=config, counts=counts, steps=steps)

    def outlook(of: JobSpec) -> Outlook:
        changed = work(of)
        memory = refined(estimate_memory(changed), refinement(measured.get(method_of(changed), ())))
        return memory, None if kind is None else step_seconds(changed, kind)

    if spec.batch.micro_batch_size == "auto":
        decided = spec.batch.rows_at_once if budget_gib is None else most_rows_at_once(spec, budget_gib, outlook)
        spec = with_rows_at_once(spec, decided)
    asked = work(spec)
    memory, seconds = outlook(spec)
    if counts is None:
        seconds = None
    fits = None if budget_gib is None else memory.total_gib <= budget_gib
    knobs = knobs_for(spec, budget_gib, asked.longest, outlook) if budget_gib is not None and not fits else []
    return PlanRecord(
        ready=counts is not None,
        train_rows=train_rows,
        eval_rows=eval_rows,
        steps=steps,
        tokens=counts or [],
        rows_at_once=spec.batch.rows_at_once,
        trainable_parameters=asked.trainable,
        memory=memory,
        refinement=refinement(measured.get(method_of(asked), ())),
        budget_gib=budget_gib,
        fits=fits,
        knobs=knobs,
        total_tokens=None if steps is None else round(steps * asked.step_tokens),
        gpu=gpu if kind is not None else None,
        step_seconds=seconds,
        seconds=None if steps is None or seconds is None else steps * seconds,
        warnings=list(_warnings(spec, counts, train_rows, steps, memory, budget_gib, knobs)),
    )


def _without_estimate(spec: JobSpec, counts: list[TokenCounts] | None, budget_gib: float | None) -> PlanRecord:
    """Steps alone: what the towers of pictures need has not been worked out, so nothing is held against any worker."""
    train_rows = eval_rows = steps = None
    warnings = [f"there is no estimate of memory and time for task {spec.task} yet: no worker is held to be too small for it"]
    if counts is not None:
        examples, pictures = sum(c.examples for c in counts), sum(c.rows for c in counts)
        # What is held out are pictures, and with them all their captions.
        eval_rows = min(round(spec.data.eval_rows * examples / pictures), examples)
        train_rows = examples - eval_rows
        steps = steps_of(spec, counts, eval_rows) if train_rows else 0
        warnings += _data_warnings(spec, counts, train_rows, steps)
    return PlanRecord(
        ready=counts is not None,
        train_rows=train_rows,
        eval_rows=eval_rows,
        steps=steps,
        tokens=counts or [],
        rows_at_once=spec.batch.rows_at_once,
        trainable_parameters=None,
        memory=None,
        budget_gib=budget_gib,
        fits=None,
        knobs=[],
        total_tokens=None,
        gpu=None,
        step_seconds=None,
        seconds=None,
        warnings=warnings,
    )


def _warnings(
    spec: JobSpec,
    counts: list[TokenCounts] | None,
    train_rows: int | None,
    steps: int | None,
    memory: MemoryEstimate,
    budget_gib: float | None,
    knobs: list[Knob],
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
    rows = spec.batch.step_rows
    if not 16 <= rows <= 64:
        yield f"{rows} rows per step (micro_batch_size × gradient_accumulation_steps) is outside the usual 16 to 64"
    yield from _data_warnings(spec, counts or [], train_rows, steps)
    if budget_gib is not None and memory.total_gib > budget_gib:
        yield does_not_fit(memory, budget_gib, knobs)


def _data_warnings(spec: JobSpec, counts: list[TokenCounts], train_rows: int | None, steps: int | None) -> Iterator[str]:
    for count in counts:
        if count.truncated_rows:
            cut = f"{count.truncated_rows} of {count.rows} rows are longer than data.max_length {spec.data.max_length}"
            yield f"{count.dataset_id}: {cut} and lose their end (the longest has {count.longest} tokens)"
        if count.rows_without_target:
            yield f"{count.dataset_id}: {count.rows_without_target} rows keep no token to train on and are dropped"
    if train_rows == 0:
        yield f"data.eval_rows {spec.data.eval_rows} leaves no row to train on: the job would fail"
    if steps and spec.schedule.warmup_steps >= steps:
        yield f"schedule.warmup_steps {spec.schedule.warmup_steps} covers all {steps} steps: the full learning rate comes last"


def does_not_fit(memory: MemoryEstimate, budget_gib: float, knobs: list[Knob]) -> str:
    """The sentence for a job that is too large, with its numbers and the best ways out."""
    names = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
    parts = ", ".join(f"{name} {getattr(memory, name + '_gib'):.1f}" for name in names)
    said = f"about {memory.total_gib:.1f} GiB are needed ({parts}) and the largest worker plans with {budget_gib:.1f}"
    ways = [_way(knob) for knob in knobs if knob.fits][:_WAYS]
    return said + (": " + "; or ".join(ways) if ways else "; none of the known changes is enough")


def _way(knob: Knob) -> str:
    changes = ", ".join(f"{pointer.strip('/').replace('/', '.')}: {_value(value)}" for pointer, value in knob.changes.items())
    time = "" if knob.step_time is None else f", {knob.step_time:.2f} times as long a step"
    return f"{changes} ({knob.total_gib:.1f} GiB{time})"


def _value(value: Any) -> str:
    return str(value["kind"] if isinstance(value, dict) else str(value).lower())
