"""Models of two towers at the border: what registration asks of a folder, and what a job may ask of the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.catalog import TWO_TOWERS
from core.errors import InvalidInput
from core.model_folder import context_length, read_model_facts
from core.plan import check_spec, plan
from core.records import TokenCounts
from core.run import picture_key
from core.spec import InfoNceObjective, JobSpec, SftObjective
from tests.tiny import build_tiny_clip

DATASET = "ds_00000000"
JOB: dict[str, Any] = {"task": "contrastive", "base_model": "clip", "data": {"datasets": [{"dataset_id": DATASET}]}}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


def problems(clip: Path, **changes: Any) -> list[str]:
    facts = read_model_facts(clip)
    spec = JobSpec.model_validate(JOB | changes)
    found = check_spec(spec, architecture=facts.architecture, context_length=facts.context_length, config=facts.config)
    return [f"{problem.pointer}: {problem.message}" for problem in found]


def test_registration_reads_lengths_and_the_processors_digest(clip: Path, tmp_path: Path) -> None:
    facts = read_model_facts(clip)
    assert (facts.architecture, facts.context_length, facts.has_chat_template) == ("CLIPModel", 40, False)
    copy = tmp_path / "copy"
    shutil.copytree(clip, copy)
    assert read_model_facts(copy).processor == facts.processor
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 2}))
    assert read_model_facts(copy).processor not in (facts.processor, None)
    path.unlink()
    with pytest.raises(InvalidInput) as error:
        read_model_facts(copy)
    assert "preprocessor_config.json" in error.value.problems[0].message
    assert context_length({"architectures": ["CLIPModel"]}) == TWO_TOWERS["CLIPModel"].text_length == 77


def test_jobs_ask_of_a_model_what_it_is_for(clip: Path) -> None:
    assert problems(clip) == []
    text = {"task": "causal_lm", "objective": {"kind": "sft"}}
    assert problems(clip, **text) == ["/task: clip is a CLIPModel, a model for task contrastive, not causal_lm"]
    lora = {"kind": "lora", "target_modules": ["q_proj", "visual_projection", "o_proj"]}
    (wrong,) = problems(clip, tuning=lora)
    assert wrong.startswith("/tuning/target_modules/2: clip has no linear module o_proj; it has: q_proj, k_proj")
    locked = problems(clip, tuning=lora, pictures={"image_tower": "locked"})
    assert [one.split(":")[0] for one in locked] == ["/tuning/target_modules/1", "/tuning/target_modules/2"]
    assert problems(clip, eval={"every_steps": 5}) == ["/eval/every_steps: there is nothing to evaluate on: set data.eval_rows"]


def test_a_plan_counts_steps_and_claims_no_more(clip: Path) -> None:
    facts = read_model_facts(clip)
    spec = JobSpec.model_validate(JOB | {"data": JOB["data"] | {"eval_rows": 10}, "batch": {"micro_batch_size": 8}})
    counts = TokenCounts(
        dataset_id=DATASET,
        rows=50,  # pictures, each with three captions
        examples=150,
        tokens=1500,
        trained_tokens=1200,
        truncated_rows=2,
        rows_without_target=0,
        longest=99,
    )
    known = {"architecture": facts.architecture, "parameters": facts.parameters, "config": facts.config}
    found = plan(spec, counts=[counts], budget_gib=0.001, **known)
    assert (found.ready, found.train_rows, found.eval_rows, found.steps) == (True, 120, 30, 15)
    assert (found.memory, found.fits, found.trainable_parameters, found.seconds) == (None, None, None, None)
    assert "no estimate" in found.warnings[0]
    assert "2 of 50 rows" in found.warnings[1]
    unknown = plan(spec, counts=None, budget_gib=None, **known)
    assert (unknown.ready, unknown.steps) == (False, None)


def test_a_picture_caches_name_follows_dataset_and_processor_and_no_setting() -> None:
    key = picture_key("a", "p", InfoNceObjective())
    assert key == picture_key("a", "p", InfoNceObjective(temperature=0.5)) is not None
    assert len({key, picture_key("b", "p", InfoNceObjective()), picture_key("a", "q", InfoNceObjective())}) == 3
    assert picture_key("a", "p", SftObjective()) is picture_key("a", None, InfoNceObjective()) is None
