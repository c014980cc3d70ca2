"""Knobs: what would make a job fit a budget, by planning the changed job, best first.

First come those that change nothing of what is learned, then those that do; among each kind the ones that fit, the fastest of
them first. What a step trains on stays the same: a smaller micro-batch is made up for by more of them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from core.records import Knob, MemoryEstimate
from core.spec import JobSpec, with_rows_at_once

Outlook = tuple[MemoryEstimate, float | None]
"""(memory, seconds of a step where the GPU's kind is known)"""

Changes = dict[str, Any]
"""JSON pointer into the spec -> its new value."""

_FEWEST_TOKENS = 256
_MARGIN = 0.1
_SHOWN = 8


def knobs_for(spec: JobSpec, budget_gib: float, longest: int, outlook: Callable[[JobSpec], Outlook]) -> list[Knob]:
    """Up to eight changes to a job that does not fit; `longest` is that of its rows. Empty where nothing would take less."""
    before, seconds = outlook(spec)
    found: list[tuple[bool, Knob]] = []
    for changes, is_neutral in _candidates(spec, budget_gib, longest, outlook):
        changed = changed_spec(spec, changes)
        if changed is None:
            continue
        memory, new_seconds = outlook(changed)
        if memory.total_gib >= before.total_gib:
            continue
        knob = Knob(
            changes=changes,
            total_gib=memory.total_gib,
            fits=memory.total_gib <= budget_gib,
            step_time=new_seconds / seconds if new_seconds is not None and seconds else None,
            same_training=is_neutral,
        )
        if not any(knob.changes == other.changes for _, other in found):
            found.append((is_neutral, knob))
    found.sort(key=lambda pair: (not pair[1].fits, not pair[0], pair[1].step_time or 0.0, pair[1].total_gib))
    return [knob for _, knob in found[:_SHOWN]]


def most_rows_at_once(spec: JobSpec, budget_gib: float, outlook: Callable[[JobSpec], Outlook]) -> int:
    """The most rows of a step, by halves, whose plan leaves a tenth of the budget free; 1 where none does."""
    rows = spec.batch.step_rows
    while rows > 1 and outlook(with_rows_at_once(spec, rows))[0].total_gib > (1 - _MARGIN) * budget_gib:
        rows = math.ceil(rows / 2)
    return rows


def changed_spec(spec: JobSpec, changes: Changes) -> JobSpec | None:
    """The spec with the changes; None where they make no valid one."""
    fields = spec.model_dump(mode="json")
    for pointer, value in changes.items():
        *path, last = pointer.strip("/").split("/")
        place = fields
        for part in path:
            place = place[part]
        place[last] = value
    try:
        return JobSpec.model_validate(fields)
    except ValidationError:
        return None


def _candidates(
    spec: JobSpec, budget_gib: float, longest: int, outlook: Callable[[JobSpec], Outlook]
) -> Iterator[tuple[Changes, bool]]:
    """(changes, whether what is learned stays the same), single knobs and then those that go well together."""
    recompute: Changes = {} if spec.memory.checkpointing else {"/memory/checkpointing": True}
    offload: Changes = recompute | {"/memory/checkpointing_offload": True}
    small: Changes = {"/optim/kind": "adamw_8bit"}
    paged: Changes = {"/optim/kind": "paged_adamw_8bit"}
    four_bits: Changes = {"/quantization": {"kind": "nf4"}}
    adapter: Changes = {"/tuning": {"kind": "lora"}}
    for base, is_neutral in (
        ({}, True),
        (recompute, True),
        (offload, True),
        (small, False),
        (paged, False),
        (recompute | paged, False),
        (four_bits, False),
        (recompute | four_bits, False),
        (adapter, False),
        (recompute | adapter | four_bits, False),
    ):
        if base:
            yield base, is_neutral
        yield from ((base | smaller, is_neutral) for smaller in _smaller_batch(spec, base, budget_gib, outlook))
    length = min(longest, spec.data.max_length) // 2
    while length >= _FEWEST_TOKENS:
        shorter: Changes = {"/data/max_length": length}
        changed = changed_spec(spec, shorter)
        if length * 2 <= _FEWEST_TOKENS * 2 or (changed is not None and outlook(changed)[0].total_gib <= budget_gib):
            yield shorter, False
            return
        length //= 2


def _smaller_batch(spec: JobSpec, base: Changes, budget_gib: float, outlook: Callable[[JobSpec], Outlook]) -> Iterator[Changes]:
    """The largest part of the micro-batch, by halves, that fits together with `base`; else a single row."""
    rows, times = spec.batch.rows_at_once, 1
    while rows % 2 == 0:
        rows, times = rows // 2, times * 2
        changes: Changes = {"/batch/micro_batch_size": rows}
        if spec.batch.rows_per_step is None:
            changes["/batch/gradient_accumulation_steps"] = spec.batch.gradient_accumulation_steps * times
        changed = changed_spec(spec, base | changes)
        if changed is None:
            return
        if rows % 2 or outlook(changed)[0].total_gib <= budget_gib:
            yield changes
            return
