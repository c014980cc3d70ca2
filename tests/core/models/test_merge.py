"""A merged model answers as base and adapter did, without peft; what would be another model is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.adapter import ADAPTER_KIND, AdapterFacts, BaseIdentity, Quantization
from core.errors import InvalidInput
from core.manifest import closed_folder, verify_folder
from core.model_folder import MODEL_KIND, read_model_facts
from core.models.adapt import attach_adapter, load_adapter, save_lora, save_tokenizer
from core.models.fp8 import rows_unrounded
from core.models.load import ComputeDtype
from core.models.merge import main, merge_adapter
from core.spec import LoraTuning, MoraTuning
from tests.core.models.adapters import IDS, TUNINGS, load, logits_of
from tests.tiny import CHATML, build_tiny_model


def adapter_folder(
    tiny: Path,
    folder: Path,
    tuning: LoraTuning | MoraTuning,
    quantization: Quantization = "none",
    compute: ComputeDtype = "fp32",
    kind: str | None = None,
) -> Path:
    """What a job leaves, its update random and large."""
    model = attach_adapter(load(tiny, quantization, compute).model, tuning, "test/tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    weights = read_model_facts(tiny).weights
    facts: dict[str, Any] = {
        "tuning": kind or tuning.kind,
        "base": BaseIdentity(model="test/tiny", weights=weights, quantization=quantization, compute_dtype=compute),
        "job_id": "job_test",
        "attempt": 1,
        "step": 3,
        "rank": 4,
        "template": "t",
        "eval_loss": None,
    }
    with closed_folder(folder, ADAPTER_KIND, AdapterFacts(**facts).model_dump(mode="json")) as draft:
        save_lora(model, draft)
        save_tokenizer(tiny, draft, CHATML)
    return folder


def merged_logits(folder: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("name", TUNINGS)
def test_in_full_precision_the_merged_model_answers_as_base_and_adapter(tiny: Path, tmp_path: Path, name: str) -> None:
    adapter = adapter_folder(tiny, tmp_path / "adapter", TUNINGS[name])
    merged = merge_adapter(tiny, adapter, tmp_path / "out", precision="fp32")
    expected = logits_of(load_adapter(load(tiny).model, adapter, "a"))
    assert (merged_logits(tmp_path / "out") - expected).abs().max() < 1e-4
    assert (expected - logits_of(load(tiny).model)).abs().max() > 0.1
    assert merged == read_model_facts(tmp_path / "out"), "it can be registered"
    assert merged.weights != read_model_facts(tiny).weights
    assert verify_folder(tmp_path / "out", MODEL_KIND)["base"] == read_model_facts(tiny).weights
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("default", "nf4"), ("dora", "nf4-double"), ("pissa", "fp4"), ("mora", "nf4"), ("default", "int8"), ("pissa", "fp8")],
)
def test_trap_14_a_quantised_base_is_merged_as_its_quantised_weights_and_only_when_asked(
    tiny: Path, tmp_path: Path, name: str, quantization: Quantization
) -> None:
    adapter = adapter_folder(tiny, tmp_path / "adapter", TUNINGS[name], quantization)
    with pytest.raises(InvalidInput, match=f"was trained on {quantization} weights.*--dequantize"):
        merge_adapter(tiny, adapter, tmp_path / "out")
    merge_adapter(tiny, adapter, tmp_path / "out", dequantize=True)
    found = merged_logits(tmp_path / "out")

    model = load_adapter(load(tiny, quantization).model, adapter, "a")
    model.train()  # there is no dropout; in eval mode int8 rounds the inputs too
    with torch.no_grad(), rows_unrounded(model):  # which is not in the weights
        expected = model(IDS).logits
    assert (found - expected).abs().max() < 1e-4
    on_the_originals = logits_of(load_adapter(load(tiny).model, adapter, "a"))
    assert (on_the_originals - expected).abs().max() > 1e-3


def test_what_was_computed_in_bf16_is_folded_into_bf16_weights(tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tiny, tmp_path / "adapter", TUNINGS["default"], compute="bf16")
    merge_adapter(tiny, adapter, tmp_path / "exact", precision="fp32")
    merge_adapter(tiny, adapter, tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    assert (out.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    rounded = load(tiny, precision="bf16").model
    for name, weight in exact.named_parameters():
        if "proj" not in name:
            assert torch.equal(weight, rounded.get_parameter(name).float()), name
        assert torch.equal(weight.bfloat16(), out.get_parameter(name)), name


def test_another_base_a_full_model_and_a_taken_place_are_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(tiny, tmp_path / "adapter", TUNINGS["default"])
    other = build_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(InvalidInput, match=r"other: its weights are .*; the adapter was trained on test/tiny"):
        merge_adapter(other, adapter, tmp_path / "out")
    with pytest.raises(InvalidInput, match="is there already"):
        merge_adapter(tiny, adapter, other)
    full = adapter_folder(tiny, tmp_path / "full", TUNINGS["default"], kind="full")
    with pytest.raises(InvalidInput, match="is a whole model already"):
        merge_adapter(tiny, full, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_folder(tiny, tmp_path / "adapter", TUNINGS["default"], "nf4")
    words = [str(tiny), str(adapter), str(tmp_path / "out")]
    assert main(words) == 1
    assert "--dequantize" in capsys.readouterr().err
    assert main([*words, "--dequantize", "--precision", "fp16"]) == 0
    printed = capsys.readouterr().out
    weights = read_model_facts(tmp_path / "out").weights
    assert printed.count("\n") == 1
    assert f"LlamaForCausalLM, {read_model_facts(tiny).parameters} parameters, weights {weights[:12]}" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16
