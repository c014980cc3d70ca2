"""memory.fused_layers: taken where it can be, refused with the reason where it can't, undone where it disagrees."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core.catalog import FAMILIES as CATALOGUE
from core.errors import BadSpec
from core.events import Started
from core.models.families import FAMILIES
from core.plan import check_spec
from core.train import result
from core.train.build import build_training
from core.train.fused.elementwise import Elementwise, gated
from core.train.fused.install import fused_layer
from tests.core.train.runs import losses, run_input, spec_of, train_here
from tests.tiny import build_tiny_model

FUSED = {"precision": "fp32", "fused_layers": True}


def started(events: list[Any]) -> Started:
    found: Started = next(event for event in events if event.kind == "started")
    return found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"objective": {"kind": "plain_text"}},
        {"quantization": {"kind": "nf4"}},
        {"memory": FUSED | {"checkpointing": True, "checkpointing_every": 2}},
    ],
    ids=["sft", "plain-text", "nf4", "every-second"],
)
def test_three_tiers_learn_the_same(tiny: Path, cache: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    memory = change.pop("memory", FUSED)
    plain_batch = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "packing": "off"}
    jobs = {
        "plain": spec_of(**change, memory=memory | {"fused_layers": False}, batch=plain_batch),
        "packed": spec_of(**change, memory=memory | {"fused_layers": False}),
        "fused": spec_of(**change, memory=memory),
    }
    runs = {name: train_here(run_input(tiny, cache, job), tmp_path / name) for name, job in jobs.items()}
    assert {name: started(events).tier for name, events in runs.items()} == {name: name for name in jobs}
    for name in ("packed", "fused"):
        assert losses(runs[name]) == pytest.approx(losses(runs["plain"]), abs=5e-5)


def test_fused_layers_that_compute_something_else_are_taken_out(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = train_here(run_input(tiny, cache, spec_of()), tmp_path / "packed")
    wrong = Elementwise(gated=lambda *parts: 1.5 * gated(*parts))
    monkeypatch.setattr("core.train.enter.PLAIN", wrong)
    events = train_here(run_input(tiny, cache, spec_of(memory=FUSED)), tmp_path / "run")
    assert started(events).tier == "packed"
    (warning,) = [event for event in events if event.kind == "warning"]
    assert warning.code == "fused_mismatch"
    assert losses(events) == pytest.approx(losses(packed), abs=1e-6)
    training = build_training(run_input(tiny, cache, spec_of(memory=FUSED)))
    assert all(fused_layer(layer) is None for layer in training.model.get_base_model().get_decoder().layers)


def test_the_catalogue_names_the_families_that_have_fused_layers() -> None:
    assert {family.name for family in CATALOGUE.values() if family.fused} == set(FAMILIES)


def test_the_result_is_written_by_the_layers_own_weights(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    save = result.save_full

    def saving(model: Any, *arguments: Any) -> None:
        written.extend(fused_layer(layer) for layer in model.get_decoder().layers)
        save(model, *arguments)

    monkeypatch.setattr(result, "save_full", saving)
    spec = spec_of(tuning={"kind": "full"}, optim={"learning_rate": 1e-3}, memory=FUSED, schedule={"max_steps": 2})
    assert started(train_here(run_input(tiny, cache, spec), tmp_path / "run")).tier == "fused"
    assert written == [None, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tuning": {"kind": "mora", "rank": 4}}, "have no MoRA"),
        ({"tuning": {"kind": "lora", "dora": True}}, "have no DoRA"),
        ({"tuning": {"kind": "lora", "dropout": 0.1}}, "set tuning.dropout 0, not 0.1"),
        ({"quantization": {"kind": "int8"}}, "have no int8 weights"),
        ({"objective": {"kind": "dpo"}}, "serve sft and plain_text, not dpo"),
        ({"batch": {"packing": "off"}}, "need packed rows"),
        ({"memory": FUSED | {"compile": True}}, "compile what they need themselves"),
    ],
)
def test_what_fused_layers_know_nothing_of_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=f"fused_layers .*{reason}"):
        spec_of(**{"memory": FUSED} | change)


def test_a_model_without_fused_layers_is_refused_at_submit_and_by_the_engine(cache: Path, tmp_path: Path) -> None:
    spec = spec_of(memory=FUSED)
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}

    def problems(architecture: str) -> list[str]:
        found = check_spec(spec, architecture=architecture, context_length=512, config=config)
        return [problem.message for problem in found if problem.pointer == "/memory/fused_layers"]

    assert problems("LlamaForCausalLM") == []
    assert problems("GemmaForCausalLM") == ["test/tiny: gemma has no fused layers"]
    assert problems("Gemma2ForCausalLM") == ["test/tiny: its attention caps its scores"]
    gemma = build_tiny_model(tmp_path / "gemma", family="gemma")
    with pytest.raises(BadSpec, match=r"memory\.fused_layers: gemma has no fused layers"):
        build_training(run_input(gemma, cache, spec))
    mistral = build_tiny_model(tmp_path / "mistral", family="mistral", sliding_window=8)
    with pytest.raises(BadSpec, match=r"memory\.fused_layers: its attention sees 8 tokens"):
        build_training(run_input(mistral, cache, spec))


@pytest.mark.parametrize("lever", [{"compile": True}, {"checkpointing": True, "checkpointing_offload": True}])
def test_levers_of_a_gpu_are_refused_on_a_cpu(tiny: Path, cache: Path, lever: dict[str, Any]) -> None:
    with pytest.raises(BadSpec, match=r"memory\.(compile|checkpointing_offload): only offered on a GPU"):
        build_training(run_input(tiny, cache, spec_of(memory={"precision": "fp32"} | lever)))
