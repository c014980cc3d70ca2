"""Specs, counts and plans of a 7B Llama."""

from typing import Any

from core.plan import plan
from core.plan.work import Work, work_of
from core.records import PlanRecord, TokenCounts
from core.spec import JobSpec

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
PARAMETERS_7B = 6_738_415_616
H100 = "NVIDIA H100 80GB HBM3"


def spec(**fields: Any) -> JobSpec:
    data = {"datasets": [{"dataset_id": "ds_aaaaaaaaaa"}]} | fields.pop("data", {})
    return JobSpec.model_validate({"base_model": "m", "data": data} | fields)


def counted(rows: int, *, dataset: str = "ds_aaaaaaaaaa", **fields: int) -> TokenCounts:
    rest = {"tokens": 10 * rows, "trained_tokens": 5 * rows, "truncated_rows": 0, "rows_without_target": 0, "longest": 40}
    return TokenCounts(dataset_id=dataset, rows=rows, **(rest | fields))


def equal(rows: int, length: int) -> TokenCounts:
    """Rows of one length, half of it trained."""
    sums = {"tokens": rows * length, "trained_tokens": rows * length // 2, "squared_tokens": rows * length**2}
    return counted(rows, longest=length, **sums)


def planned(job: JobSpec, *counts: TokenCounts, budget_gib: float | None = None, gpu: str | None = None) -> PlanRecord:
    return plan(
        job,
        architecture="LlamaForCausalLM",
        parameters=PARAMETERS_7B,
        config=LLAMA_7B,
        counts=list(counts) or None,
        budget_gib=budget_gib,
        gpu=gpu,
    )


def work(job: JobSpec, *counts: TokenCounts, steps: int | None = None) -> Work:
    return work_of(
        job,
        architecture="LlamaForCausalLM",
        parameters=PARAMETERS_7B,
        config=LLAMA_7B,
        counts=list(counts) or None,
        steps=steps,
    )
