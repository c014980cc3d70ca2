"""Jobs over pictures and captions: what goes together, and that what was stored before there were any reads as it did."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core.spec import DATA_KINDS, OBJECTIVES, JobSpec, upgrade_spec

JOB: dict[str, Any] = {"base_model": "tiny", "data": {"datasets": [{"dataset_id": "ds_00000000"}]}}
PAIRS = JOB | {"task": "contrastive"}
STORED = Path(__file__).parent / "stored_spec.json"
"""A spec as it was stored when causal_lm was the only task."""


def test_a_spec_stored_before_there_were_tasks_with_pictures_reads_as_it_did() -> None:
    stored = json.loads(STORED.read_text())
    spec = upgrade_spec(stored)
    written = spec.model_dump(mode="json")
    assert {name: written[name] for name in stored} == stored
    assert {name: value for name, value in written.items() if name not in stored} == {"pictures": None}


def test_the_task_brings_its_objective_and_a_stored_spec_reads_back_equal() -> None:
    spec = JobSpec.model_validate(PAIRS)
    assert spec.objective.model_dump() == {"kind": "info_nce", "temperature": 0.07, "learn_temperature": None}
    assert upgrade_spec(spec.model_dump(mode="json")) == spec


def test_every_objective_belongs_to_one_task() -> None:
    assert sorted(kind for kinds in OBJECTIVES.values() for kind in kinds) == sorted(DATA_KINDS)


@pytest.mark.parametrize("tuning", ["full", "projection", "lora"])
def test_tunings_of_the_task(tuning: str) -> None:
    assert JobSpec.model_validate(PAIRS | {"tuning": {"kind": tuning}}).tuning.kind == tuning


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (JOB | {"objective": {"kind": "info_nce"}}, "causal_lm has no objective info_nce: use sft or plain_text or"),
        (PAIRS | {"objective": {"kind": "sft"}}, "task contrastive has no objective sft: use info_nce"),
        (JOB | {"tuning": {"kind": "projection"}}, "tuning projection is for task contrastive"),
        (JOB | {"pictures": {}}, "pictures is for task contrastive"),
        (JOB | {"eval": {"metric": "eval_image_to_text_recall_at_1"}}, "only measured for task contrastive"),
        (PAIRS | {"tuning": {"kind": "mora"}}, "no tuning mora"),
        (PAIRS | {"tuning": {"kind": "lora", "train_embeddings": True}}, "train_embeddings is for models of text"),
        (PAIRS | {"objective": {"kind": "info_nce", "learn_temperature": True}}, "no place for a temperature"),
        (PAIRS | {"objective": {"kind": "info_nce", "negatives": "hard"}}, "Extra inputs are not permitted"),
        (PAIRS | {"objective": {"kind": "info_nce", "temperature": 0.005}}, "greater than or equal to 0.01"),
        (PAIRS | {"quantization": {"kind": "nf4"}}, "no quantization nf4"),
        (PAIRS | {"data": JOB["data"] | {"template": "chatml"}}, "leave data.template model"),
        (PAIRS | {"data": JOB["data"] | {"new_tokens": ["x"]}}, "no data.new_tokens"),
        (PAIRS | {"batch": {"micro_batch_size": 1}}, "a pair alone has nothing to be told from"),
        (PAIRS | {"batch": {"micro_batch_size": "auto", "rows_per_step": 8}}, "set a number"),
        (PAIRS | {"batch": {"packing": "on"}}, "leave batch.packing auto"),
        (PAIRS | {"batch": {"group_by_length": True}}, "leave it out"),
        (PAIRS | {"memory": {"checkpointing": True}}, "no memory.checkpointing"),
        (PAIRS | {"memory": {"compile": True}}, "no memory.compile"),
        (PAIRS | {"memory": {"fused_layers": True}}, "no memory.fused_layers"),
        (PAIRS | {"data": JOB["data"] | {"eval_rows": 2}, "eval": {"panel": ["a"]}}, "eval.panel asks for answers"),
        (PAIRS | {"data": JOB["data"] | {"eval_rows": 2}, "eval": {"generation": {}}}, "needs conversations"),
    ],
)  # fmt: skip
def test_what_can_not_be_together_is_said(job: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(job)
    assert reason in str(caught.value)
