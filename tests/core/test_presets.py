"""Presets fill in what a job leaves out, and nothing else."""

import pytest
from pydantic import ValidationError

from core.presets import PRESETS
from core.spec import JobSpec, LoraTuning

JOB = {"base_model": "tiny", "data": {"datasets": [{"dataset_id": "ds_00000000"}]}}


def test_the_spec_offers_every_preset() -> None:
    for name in PRESETS:
        assert JobSpec.model_validate({**JOB, "preset": name}).preset == name
    with pytest.raises(ValidationError, match="guide-qlora"):
        JobSpec.model_validate({**JOB, "preset": "guide-best"})


def test_what_the_job_says_stands_and_the_rest_is_the_presets() -> None:
    spec = JobSpec.model_validate({**JOB, "preset": "guide-qlora", "tuning": {"kind": "lora", "rank": 32}, "seed": 5})
    assert isinstance(spec.tuning, LoraTuning)
    assert (spec.tuning.rank, spec.tuning.alpha, spec.tuning.target_modules) == (32, 32.0, ["q_proj", "v_proj"])
    assert (spec.quantization.kind, spec.optim.kind, spec.schedule.epochs, spec.seed) == ("nf4", "paged_adamw_8bit", 3.0, 5)


def test_a_choice_of_another_kind_takes_nothing_from_the_preset() -> None:
    spec = JobSpec.model_validate({**JOB, "preset": "guide-qlora", "tuning": {"kind": "mora"}, "quantization": {"kind": "none"}})
    assert spec.tuning.model_dump() == {"kind": "mora", "rank": 8, "target_modules": "all-linear"}
    assert spec.quantization.model_dump() == {"kind": "none"}


def test_a_stored_spec_reads_as_it_was_written() -> None:
    spec = JobSpec.model_validate({**JOB, "preset": "guide-lora", "optim": {"learning_rate": 1e-4}})
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert spec.optim.learning_rate == 1e-4
