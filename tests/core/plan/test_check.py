"""Everything that a model can't do of a spec is named, at once."""

from typing import Any

from core.errors import Problem
from core.plan import check_spec
from core.spec import JobSpec
from tests.core.plan.jobs import LLAMA_7B, spec


def checked(job: JobSpec, context_length: int = 4096) -> list[Problem]:
    return check_spec(job, architecture="LlamaForCausalLM", context_length=context_length, config=LLAMA_7B)


def test_everything_the_model_can_not_do_is_named_at_once() -> None:
    datasets = [{"dataset_id": "ds_aaaaaaaaaa"}, {"dataset_id": "ds_aaaaaaaaaa"}]
    job = spec(
        data={"datasets": datasets, "max_length": 4097},
        tuning={"kind": "lora", "target_modules": ["q_proj", "query_key_value"]},
        eval={"every_steps": 10},
    )
    problems = checked(job)
    assert [problem.pointer for problem in problems] == [
        "/data/max_length",
        "/tuning/target_modules/1",
        "/eval/every_steps",
        "/data/datasets/1/dataset_id",
    ]
    empty = spec(tuning={"kind": "lora", "target_modules": []})
    assert [p.code for p in checked(empty)] == ["no-target-modules"]
    assert checked(spec(), context_length=512) == []


def test_patterns_and_ranks_that_the_model_can_not_have_are_refused_at_submit() -> None:
    tuning: dict[str, Any] = {"kind": "lora", "target_modules": ["q_proj", "down_proj"], "rank": 8}
    good = {"layers.*.self_attn.q_proj": 4, "layers.31.mlp.down_proj": 16}
    assert checked(spec(tuning=tuning | {"rank_pattern": good})) == []
    bad = {"layers.32.self_attn.q_proj": 4, "v_proj": 2}
    problems = checked(
        spec(tuning=tuning | {"rank_pattern": bad, "alpha_pattern": {"model.layers.0.*.q_proj": 2.0, "q_proj": 3.0}})
    )
    assert [problem.pointer for problem in problems] == [
        "/tuning/rank_pattern/layers.32.self_attn.q_proj",
        "/tuning/rank_pattern/v_proj",
        "/tuning/alpha_pattern/q_proj",
    ]
    mora = spec(tuning={"kind": "mora", "target_modules": ["q_proj", "query"]})
    assert [problem.pointer for problem in checked(mora)] == ["/tuning/target_modules/1"]
    narrow = LLAMA_7B | {"num_key_value_heads": 1}
    job = spec(tuning={"kind": "lora", "init": "pissa", "rank": 129})
    assert checked(job) == []
    (problem,) = check_spec(job, architecture="LlamaForCausalLM", context_length=4096, config=narrow)
    assert (problem.code, problem.pointer) == ("rank-exceeds-module", "/tuning/rank")
