"""A model that brings its own code: never run without the operator's word; with it, trained, kept and served like any other."""

import json
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.adapter import ParityRecord, tolerance
from core.catalog import REMOTE_CODE
from core.data.tokenizer import Tokenizer
from core.errors import ArtifactError, BadSpec, InvalidInput
from core.eval.logprobs import sequence_logprobs
from core.eval.nats import trained_nats
from core.eval.rows import Example, collate_padded
from core.infer.adapters import AdaptedBase
from core.infer.generate import generate
from core.infer.progress import End, Token
from core.infer.sampling import Sampling
from core.model_folder import read_model_facts, verify_code
from core.models.load import LoadedBase, load_base
from core.models.remote_code import linear_leaf_names
from core.plan import check_spec, plan
from core.plan.shape import model_shape
from tests.core.train.runs import Child, losses, random_rows, run_input, spec_of, train_here, write_cache
from tests.tiny import build_remote_code_model, build_tiny_model

CPU = torch.device("cpu")
MODELING = "modeling_toy_glm.py"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return build_remote_code_model(tmp_path / "toy")


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    assert not any(name.startswith("transformers_modules") for name in sys.modules), "transformers' cache of code is not used"


def load(folder: Path, quantization: Any = "none", *, allow_remote_code: bool = True) -> LoadedBase:
    return load_base(
        folder,
        name="test/toy",
        weights="0" * 64,
        quantization=quantization,
        precision="fp32",
        device=CPU,
        allow_remote_code=allow_remote_code,
    )


def rewrite(folder: Path, old: str, new: str) -> None:
    path = folder / MODELING
    source = path.read_text()
    assert source.count(old) == 1, old
    path.write_text(source.replace(old, new))


def leave_a_mark(folder: Path) -> Path:
    """Make the code show that it ran."""
    mark = folder.parent / "it-ran"
    for path in folder.glob("*.py"):
        path.write_text(f"{path.read_text()}\nopen({str(mark)!r}, 'w').close()\n")
    return mark


def test_nothing_of_it_runs_without_the_operator_s_word(toy: Path) -> None:
    mark = leave_a_mark(toy)
    with pytest.raises(InvalidInput, match=r"modeling_toy_glm\.py.*--allow-remote-code"):
        read_model_facts(toy)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(toy, allow_remote_code=False)
    assert read_model_facts(toy, allow_remote_code=True).allow_remote_code
    assert not mark.exists(), "registration reads and never runs"
    load(toy)
    assert mark.exists()


def test_a_spec_can_t_ask_for_it() -> None:
    for field in ("allow_remote_code", "trust_remote_code"):
        with pytest.raises(ValueError, match="Extra inputs"):
            spec_of(**{field: True})


@pytest.mark.parametrize("word", [False, True])
def test_code_beside_a_known_architecture_is_never_used(tmp_path: Path, word: bool) -> None:
    folder = build_tiny_model(tmp_path / "model", family="phi3")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    config[REMOTE_CODE] = {"code": "forged", "shape": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("")
    mark = leave_a_mark(folder)
    facts = read_model_facts(folder, allow_remote_code=word)
    assert facts.allow_remote_code is False
    assert REMOTE_CODE not in facts.config
    assert type(load(folder, allow_remote_code=facts.allow_remote_code).model).__module__.startswith("transformers.")
    assert not mark.exists()


def test_an_architecture_name_does_not_hide_another_model_type(toy: Path) -> None:
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InvalidInput, match="toy_glm does not go with the architecture LlamaForCausalLM"):
        read_model_facts(toy, allow_remote_code=True)


@pytest.mark.parametrize("reference", ["someone/else--modeling_toy_glm.Model", "missing.Model", None])
def test_code_that_does_not_lie_in_the_folder_is_refused(toy: Path, reference: str | None) -> None:
    config = json.loads((toy / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = reference
    (toy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="not known" if reference is None else "does not lie in the folder"):
        read_model_facts(toy, allow_remote_code=True)


def test_changed_code_is_not_the_registered_code(toy: Path) -> None:
    facts = read_model_facts(toy, allow_remote_code=True)
    verify_code(toy, facts.config)
    with (toy / "configuration_toy_glm.py").open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=facts.config[REMOTE_CODE]["code"]):
        verify_code(toy, facts.config)
    assert read_model_facts(toy, allow_remote_code=True).weights == facts.weights


def test_the_stored_matrices_tell_the_shape_without_running_the_code(toy: Path) -> None:
    facts = read_model_facts(toy, allow_remote_code=True)
    shape = model_shape(facts.architecture, facts.config)
    assert (shape.hidden, shape.intermediate, shape.layers, shape.vocabulary) == (64, 96, 2, 512)
    model = load(toy).model
    layers = [module for path, module in model.named_modules() if path.startswith("transformer.layers.1.")]
    linear = [module for module in layers if isinstance(module, torch.nn.Linear)]
    assert sorted(shape.linear.values()) == sorted((module.in_features, module.out_features) for module in linear)
    assert sorted(shape.linear) == linear_leaf_names(model) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    assert facts.context_length == 512


def test_what_it_can_t_do_is_refused_at_submit(toy: Path) -> None:
    facts = read_model_facts(toy, allow_remote_code=True)
    known = facts.model_dump(include={"architecture", "context_length", "config"})
    problems = check_spec(spec_of(tuning={"kind": "full"}), **known)
    assert [(problem.code, problem.pointer) for problem in problems] == [("remote-code-full-tuning", "/tuning/kind")]
    (problem,) = check_spec(spec_of(tuning={"kind": "lora", "target_modules": ["dense", "q_proj"]}), **known)
    assert (problem.code, problem.pointer) == ("unknown-target-module", "/tuning/target_modules/1")
    assert check_spec(spec_of(), **known) == []


@pytest.mark.parametrize(("tuning", "quantization"), [("lora", "none"), ("lora", "nf4"), ("mora", "none")])
def test_it_trains_reloads_and_answers(toy: Path, tmp_path: Path, tuning: str, quantization: str) -> None:
    facts = read_model_facts(toy, allow_remote_code=True)
    spec = spec_of(
        tuning={"kind": tuning, "rank": 4},
        quantization={"kind": quantization},
        schedule={"epochs": 4.0},
        optim={"learning_rate": 2e-2},
    )
    planned = plan(
        spec,
        architecture=facts.architecture,
        parameters=facts.parameters,
        config=facts.config,
        counts=None,
        budget_gib=None,
    )
    run = run_input(toy, write_cache(tmp_path / "cache", random_rows(40)), spec)
    before = sorted(path.relative_to(toy) for path in toy.rglob("*"))
    events = train_here(run.model_copy(update={"allow_remote_code": facts.allow_remote_code}), tmp_path / "run")
    started = next(event for event in events if event.kind == "started")
    assert started.trainable_parameters == planned.trainable_parameters > 0
    assert started.tier == "plain"
    series = losses(events)
    assert sum(series[-5:]) < sum(series[:5]) - 0.5, series
    assert before == sorted(path.relative_to(toy) for path in toy.rglob("*")), "nothing is written beside the model"

    adapter = tmp_path / "run" / "adapter"
    assert not list(adapter.glob("*.py"))
    record = ParityRecord.model_validate_json((adapter / "parity.json").read_bytes())
    host = AdaptedBase(load(toy, {"none": "none", "nf4": "nf4-double"}[quantization]))
    host.load(adapter, "it")
    host.activate("it")
    for probe in record.probes:
        found = sequence_logprobs(host.model, probe.token_ids, probe.start)
        assert found == pytest.approx(probe.logprobs, abs=tolerance("fp32"))
        assert found != pytest.approx(probe.base_logprobs, abs=tolerance("fp32"))
    prompt = record.probes[0].token_ids[:8]
    answer = list(generate(host.model, prompt, Sampling(max_tokens=12), Tokenizer.from_folder(toy), stop_ids=()))
    assert isinstance(answer[-1], End)
    tokens = [step for step in answer if isinstance(step, Token)]
    whole = sequence_logprobs(host.model, prompt + [token.id for token in tokens], start=len(prompt))
    assert [token.logprob for token in tokens] == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_child_runs_it_only_when_told_and_asks_nobody(toy: Path, tmp_path: Path, allowed: bool) -> None:
    mark = leave_a_mark(toy)
    run = run_input(toy, write_cache(tmp_path / "cache", random_rows(40)), spec_of(schedule={"max_steps": 2}))
    child = Child(run.model_copy(update={"allow_remote_code": allowed}), tmp_path / "run")
    assert (child.finish() == 0) == allowed, child.log.read_text()
    assert mark.exists() == allowed
    assert "[y/N]" not in child.log.read_text()


OWN_PARTS = """
    def get_decoder(self) -> Any:
        def decode(input_ids: Any, use_cache: Any = None) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(last_hidden_state=self.transformer(input_ids))

        return decode

    def get_output_embeddings(self) -> Any:
        return self.transformer.output_layer

    def prepare_inputs_for_generation("""


@pytest.mark.parametrize(
    ("parts", "scale", "has_head"),
    [(False, "", False), (True, "", True), (True, " * 1.001", False)],
    ids=["one piece", "decoder and head", "something between them"],
)
def test_its_loss_is_its_own_however_its_head_is_built(toy: Path, parts: bool, scale: str, has_head: bool) -> None:
    if parts:
        rewrite(toy, "\n    def prepare_inputs_for_generation(", OWN_PARTS)
    rewrite(toy, "self.transformer.output_layer(hidden)\n", f"self.transformer.output_layer(hidden){scale}\n")
    model = load(toy).model
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear) == has_head
    row = (torch.arange(5, 45).numpy().astype("int32"), (torch.arange(40) > 10).numpy().astype("uint8"))
    found, _ = trained_nats(model, collate_padded([Example((row,))], CPU))
    assert (-found).tolist() == pytest.approx(sequence_logprobs(model, row[0].tolist(), start=11), abs=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<= positions[:, None]", "<= positions[:, None] + 9", "change with later tokens"),
        ("k, v = past.update(k, v, self.layer)", "past.update(k, v, self.layer)", "answers differently from a KV cache"),
        ("return CausalLMOutputWithPast(", "raise KeyError(", "fails on a few tokens: "),
        ("from torch import nn", "from torch import nothing", "can't be imported"),
    ],
)
def test_code_that_does_something_else_is_refused_with_a_reason(toy: Path, old: str, new: str, reason: str) -> None:
    rewrite(toy, old, new)
    with pytest.raises(BadSpec, match=reason):
        load(toy)


def test_compiled_files_beside_the_code_are_not_believed(toy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "compiled-ran"
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(mark)!r}, 'w').close()\n")
    for path in toy.glob("*.py"):
        compiled = toy / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
        py_compile.compile(str(evil), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    load(toy)
    assert not mark.exists()
