"""Patterns are paths, not expressions; what they leave open or contradict is said."""

import pytest
from pydantic import ValidationError

from core.spec import JobSpec, LoraTuning, MoraTuning
from core.tuning import adapter_parameters, match_patterns, mora_size, tuning_problems

PATHS = [f"model.layers.{n}.{rest}" for n in (0, 1, 11) for rest in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 3),
        ("proj", 0),
        ("*_proj", 9),
        ("*", 9),
        ("self_attn.*", 6),
        ("layers.1.self_attn.q_proj", 1),
        ("layers.1*.self_attn.q_proj", 2),
        ("layers.*.q_proj", 0),
        ("layers.*.*.q_proj", 3),
        ("model.layers.0.mlp.up_proj", 1),
        ("x.model.layers.0.mlp.up_proj", 0),
        ("***************************************************************", 9),
    ],
)
def test_a_pattern_is_the_end_of_a_path(pattern: str, count: int) -> None:
    values, problems = match_patterns({pattern: 3}, PATHS)
    assert len(values) == count
    assert list(problems) == ([] if count else [pattern])


def test_a_dot_is_a_dot() -> None:
    assert match_patterns({"a.b": 1}, ["a.b", "axb", "a_b"])[0] == {"a.b": 1}


def test_patterns_that_contradict_each_other_are_refused_in_any_order() -> None:
    for patterns in ({"q_proj": 1, "layers.0.*.*": 2}, {"layers.0.*.*": 2, "q_proj": 1}):
        _, problems = match_patterns(patterns, PATHS)
        (problem,) = problems.values()
        assert "model.layers.0.self_attn.q_proj" in problem
    assert match_patterns({"q_proj": 2, "layers.0.*.*": 2}, PATHS)[1] == {}


def test_the_square_has_as_many_numbers_as_lora() -> None:
    assert mora_size(4096, 4096, 8) == 256
    assert mora_size(64, 128, 4) == 27
    assert mora_size(64, 128, 256) == 64


def test_numbers_are_counted_by_module() -> None:
    shapes = {"l.0.q_proj": (8, 16), "l.0.v_proj": (8, 4)}
    assert adapter_parameters(LoraTuning(rank=2), shapes) == 2 * (24 + 12)
    assert adapter_parameters(LoraTuning(rank=2, dora=True), shapes) == 2 * (24 + 12) + 20
    assert adapter_parameters(LoraTuning(rank=2, rank_pattern={"v_proj": 3}), shapes) == 2 * 24 + 3 * 12
    assert adapter_parameters(MoraTuning(rank=2), shapes) == 36 + 16


def test_problems_point_into_the_spec() -> None:
    shapes = {"l.0.q_proj": (8, 16), "l.0.v_proj": (8, 4)}
    tuning = LoraTuning(rank=5, init="pissa", rank_pattern={"k_proj": 1}, alpha_pattern={"l.1.q_proj": 1.0})
    assert [problem.pointer for problem in tuning_problems(tuning, shapes)] == [
        "/tuning/rank_pattern/k_proj",
        "/tuning/alpha_pattern/l.1.q_proj",
        "/tuning/rank",
    ]
    assert tuning_problems(LoraTuning(rank=5), shapes) == []
    assert tuning_problems(MoraTuning(rank=256), shapes) == []


def test_dora_over_int8_weights_is_refused_at_submit() -> None:
    fields = {"base_model": "m", "data": {"datasets": [{"dataset_id": "ds_aaaaaaaaaa"}]}, "quantization": {"kind": "int8"}}
    assert JobSpec.model_validate(fields | {"tuning": {"kind": "mora"}}).quantization.kind == "int8"
    with pytest.raises(ValidationError, match="dora reads its base's weights in every step, which int8 ones do not allow"):
        JobSpec.model_validate(fields | {"tuning": {"kind": "lora", "dora": True}})
