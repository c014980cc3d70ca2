"""The plan counts as the engine counts, names what can't be, and its memory follows the shapes."""

from typing import Any

import pytest

from core.errors import Problem
from core.plan import GIB, check_spec, count_steps, estimate_memory, model_shape, plan, trainable_parameters
from core.records import PlanRecord, TokenCounts
from core.spec import JobSpec, ScheduleSpec

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
PARAMETERS_7B = 6_738_415_616
QWEN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


def spec(**fields: Any) -> JobSpec:
    data = {"datasets": [{"dataset_id": "ds_aaaaaaaaaa"}]} | fields.pop("data", {})
    return JobSpec.model_validate({"base_model": "m", "data": data} | fields)


def counted(rows: int, *, dataset: str = "ds_aaaaaaaaaa", **fields: int) -> TokenCounts:
    rest = {"tokens": 10 * rows, "trained_tokens": 5 * rows, "truncated_rows": 0, "rows_without_target": 0, "longest": 40}
    return TokenCounts(dataset_id=dataset, rows=rows, **(rest | fields))


def planned(job: JobSpec, *counts: TokenCounts, budget_gib: float | None = None) -> PlanRecord:
    return plan(
        job,
        architecture="LlamaForCausalLM",
        parameters=PARAMETERS_7B,
        config=LLAMA_7B,
        counts=list(counts) or None,
        budget_gib=budget_gib,
    )


@pytest.mark.parametrize(
    ("rows", "per_step", "schedule", "steps"),
    [
        (100, 10, {}, 10),
        (101, 10, {}, 11),
        (3, 10, {}, 1),
        (101, 10, {"epochs": 3.0}, 33),
        (101, 10, {"epochs": 0.1}, 2),
        (30, 1, {"epochs": 0.1}, 3),
        (100, 10, {"epochs": 3.0, "max_steps": 7}, 7),
        (100, 10, {"max_steps": 700}, 10),
        (100, 10, {"epochs": 0.001}, 1),
    ],
)
def test_steps_are_whole_and_an_epoch_ends_with_what_is_left(
    rows: int, per_step: int, schedule: dict[str, Any], steps: int
) -> None:
    assert count_steps(rows, per_step, ScheduleSpec(**schedule)) == steps


def test_rows_without_a_target_and_held_out_rows_are_not_trained() -> None:
    job = spec(data={"eval_rows": 8}, batch={"micro_batch_size": 4, "gradient_accumulation_steps": 2})
    record = planned(job, counted(100, rows_without_target=4))
    assert (record.train_rows, record.eval_rows, record.steps) == (88, 8, 11)


def test_the_weight_of_a_dataset_is_its_passes_per_epoch() -> None:
    datasets = [{"dataset_id": "ds_aaaaaaaaaa", "weight": 2.0}, {"dataset_id": "ds_bbbbbbbbbb", "weight": 0.5}]
    job = spec(data={"datasets": datasets}, batch={"micro_batch_size": 1})
    record = planned(job, counted(10), counted(20, dataset="ds_bbbbbbbbbb"))
    assert (record.train_rows, record.steps) == (30, 2 * 10 + 10)


def test_steps_are_counted_by_examples_of_which_a_text_makes_several() -> None:
    job = spec(objective={"kind": "plain_text"}, data={"eval_rows": 10}, batch={"micro_batch_size": 5})
    record = planned(job, counted(3, examples=110, rows_without_target=1))
    assert (record.train_rows, record.eval_rows, record.steps) == (100, 10, 20)


def test_both_sequences_of_a_pair_are_in_memory_at_once() -> None:
    pairs, single = (planned(spec(objective={"kind": kind}), counted(10)).memory for kind in ("orpo", "sft"))
    assert pairs.activations_gib > single.activations_gib
    assert pairs.activations_gib == planned(spec(batch={"micro_batch_size": 8}), counted(10)).memory.activations_gib


def test_without_counts_the_plan_is_not_ready_and_knows_no_steps() -> None:
    record = planned(spec())
    assert (record.ready, record.steps, record.train_rows, record.fits) == (False, None, None, None)
    assert record.memory.total_gib > 0


def test_the_shape_of_a_config_is_the_shape_of_the_model() -> None:
    shape = model_shape("Qwen3ForCausalLM", QWEN)
    assert shape.linear["q_proj"] == (64, 128)
    assert shape.linear["k_proj"] == (64, 64)
    assert shape.linear["o_proj"] == (128, 64)
    fused = model_shape("GlmForCausalLM", QWEN)
    assert fused.linear["gate_up_proj"] == (64, 256)
    assert "gate_proj" not in fused.linear
    assert model_shape("GemmaForCausalLM", QWEN).tied_embeddings
    assert not shape.tied_embeddings
    assert model_shape("Qwen3ForCausalLM", QWEN | {"tie_word_embeddings": True}).tied_embeddings


def test_trainable_parameters_are_counted_from_rank_and_targets() -> None:
    shape = model_shape("LlamaForCausalLM", LLAMA_7B)
    lora = {"kind": "lora", "rank": 8}
    q_and_v = trainable_parameters(spec(tuning=lora | {"target_modules": ["q_proj", "v_proj"]}), shape, PARAMETERS_7B)
    assert q_and_v == 4_194_304
    assert trainable_parameters(spec(tuning=lora), shape, PARAMETERS_7B) == 19_988_480
    assert trainable_parameters(spec(tuning={"kind": "full"}), shape, PARAMETERS_7B) == PARAMETERS_7B


def memory(job: JobSpec, tokens: int = 4096) -> Any:
    shape = model_shape("LlamaForCausalLM", LLAMA_7B)
    return estimate_memory(job, shape, PARAMETERS_7B, trainable_parameters(job, shape, PARAMETERS_7B), tokens)


def test_weights_match_what_is_known_of_a_7b_model() -> None:
    assert memory(spec()).weights_gib == pytest.approx(12.6, abs=0.1)
    nf4 = memory(spec(quantization={"kind": "nf4"}))
    assert nf4.weights_gib == pytest.approx(3.6, abs=0.2)
    single = memory(spec(quantization={"kind": "nf4", "double_quantization": False}))
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert (single.weights_gib - nf4.weights_gib) * GIB * 8 / linear == pytest.approx(0.373, abs=0.002)
    assert memory(spec(quantization={"kind": "fp4"})) == nf4
    int8 = memory(spec(quantization={"kind": "int8"}))
    assert (int8.weights_gib - nf4.weights_gib) * GIB / linear == pytest.approx(1 - 0.5 - 0.127 / 8, abs=0.001)
    assert int8.activations_gib == nf4.activations_gib > memory(spec()).activations_gib, "one weight at a time is unpacked"
    assert memory(spec(quantization={"kind": "int8"}, tuning={"kind": "mora"})).weights_gib == pytest.approx(
        int8.weights_gib, abs=0.01
    )


def test_where_an_adapter_began_is_kept_beside_it() -> None:
    plain, pissa = memory(spec()), memory(spec(tuning={"kind": "lora", "init": "pissa"}))
    assert pissa.weights_gib - plain.weights_gib == pytest.approx(4 * 19_988_480 / GIB)
    assert (pissa.gradients_gib, pissa.optimizer_gib) == (plain.gradients_gib, plain.optimizer_gib)


def test_full_tuning_keeps_fp32_weights_gradients_and_two_states() -> None:
    estimate = memory(spec(tuning={"kind": "full"}, memory={"precision": "fp32"}))
    assert estimate.weights_gib == estimate.gradients_gib == pytest.approx(PARAMETERS_7B * 4 / GIB)
    assert estimate.optimizer_gib == pytest.approx(PARAMETERS_7B * 8 / GIB)
    eight_bit = memory(spec(tuning={"kind": "full"}, optim={"kind": "adamw_8bit"}))
    assert eight_bit.optimizer_gib == pytest.approx(estimate.optimizer_gib / 4, rel=0.02)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    plain, more = memory(spec(), 4096), memory(spec(), 8192)
    assert more.activations_gib > 1.9 * plain.activations_gib
    checkpointed = memory(spec(memory={"checkpointing": True}), 8192)
    assert checkpointed.activations_gib < 0.2 * more.activations_gib
    assert checkpointed.total_gib == pytest.approx(
        checkpointed.weights_gib + checkpointed.gradients_gib + checkpointed.optimizer_gib + checkpointed.activations_gib
    )


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


def test_a_sound_job_is_not_warned_about() -> None:
    job = spec(batch={"micro_batch_size": 4, "gradient_accumulation_steps": 4})
    assert planned(job, counted(1000), budget_gib=80).warnings == []


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"optim": {"learning_rate": 0.1}}, "optim.learning_rate 0.1 is outside 5e-05 to 0.0005, the usual range of LoRA"),
        ({"quantization": {"kind": "nf4"}, "optim": {"learning_rate": 1e-5}}, "QLoRA"),
        ({"quantization": {"kind": "fp4"}, "optim": {"learning_rate": 1e-5}}, "QLoRA"),
        ({"tuning": {"kind": "full"}}, "full tuning"),
        ({"tuning": {"kind": "lora", "rank": 256}}, "tuning.rank 256"),
        ({"tuning": {"kind": "lora", "alpha": 1.0}}, "tuning.alpha 1"),
        ({"batch": {"micro_batch_size": 1}}, "1 rows per step"),
        ({"schedule": {"warmup_steps": 1000}}, "warmup_steps 1000 covers all"),
        ({"data": {"eval_rows": 1000}}, "leaves no row"),
        ({"batch": {"micro_batch_size": 64}, "data": {"max_length": 4096}}, "GiB are needed"),
    ],
)
def test_what_looks_unwise_is_said(fields: dict[str, Any], part: str) -> None:
    record = planned(spec(**fields), counted(1000, longest=9999), budget_gib=24.0)
    assert any(part in warning for warning in record.warnings), record.warnings


def test_rows_that_lose_their_end_or_are_dropped_are_said() -> None:
    record = planned(spec(), counted(50, truncated_rows=7, rows_without_target=2, longest=900))
    assert any("7 of 50 rows are longer than data.max_length 512" in w and "900" in w for w in record.warnings)
    assert any("2 rows keep no token" in warning for warning in record.warnings)


def test_a_job_fits_when_its_total_is_within_the_budget() -> None:
    total = planned(spec(), counted(10)).memory.total_gib
    assert planned(spec(), counted(10), budget_gib=total + 0.1).fits is True
    assert planned(spec(), counted(10), budget_gib=total - 0.1).fits is False
