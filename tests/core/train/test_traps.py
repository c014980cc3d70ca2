"""The sixteen known ways to train something else than was asked, each with a test named after it: test_trap_<n>_...

1 labels rebuilt by a collator · 2 pad hides eos · 3 mean of means · 4 packed rows see each other · 5 a wait for the GPU in every
layer · 6 adapters in bf16, inputs cast to fp32 · 7 fp16 by default · 8 a k-bit base raised to fp32 · 9 checkpointing over a
frozen base · 10 compile keeps dequantised weights · 11 padding counted as tokens · 12 all logits in fp32 · 13 dropout dropped ·
14 merged into weights it was not trained on · 15 kernels left in the process · 16 32-bit indices. Those that need no other
place are here.
"""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from core.eval import nats
from core.models import documents
from core.train.build import build_training
from core.train.tier import PackingMismatch, restored_on_failure
from tests.conftest import ROOT
from tests.core.train.runs import run_input, spec_of, train_here, write_cache


def test_every_trap_has_its_test() -> None:
    found = {
        int(n)
        for path in (ROOT / "tests").rglob("test_*.py")
        for n in re.findall(r"^def test_trap_(\d+)_", path.read_text(), re.M)
    }
    assert found == set(range(1, 17))


def test_trap_2_a_trained_model_stops(tiny: Path, tmp_path: Path) -> None:
    """The end token is the padding token's neighbour in many models, and its twin in some; it is trained in every row."""
    end = 2
    rows = [([prompt, prompt + 1, 7, 8, end], [0, 0, 1, 1, 1]) for prompt in range(20, 52)]
    spec = spec_of(
        data={"datasets": [{"dataset_id": "ds_00000000"}]},
        tuning={"kind": "full"},
        optim={"learning_rate": 3e-3},
        schedule={"epochs": 10.0},
    )
    train_here(run_input(tiny, write_cache(tmp_path / "cache", rows), spec), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/adapter")
    answer = model.generate(torch.tensor([[30, 31]]), max_new_tokens=20, do_sample=False)[0, 2:].tolist()
    assert answer == [7, 8, end]


def test_trap_5_packed_attention_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data: whoever asks one for a value fails."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert (q.shape, k.shape, v.shape) == ((10, 4, 16), (10, 2, 16), (10, 2, 16))
        return q

    monkeypatch.setattr(documents, "varlen_attn", kernel, raising=False)
    monkeypatch.setattr(documents, "_VARLEN", frozenset({"scale", "enable_gqa", "window_size"}))
    query, key = torch.empty(1, 4, 10, 16, device="meta"), torch.empty(1, 2, 10, 16, device="meta")
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bounds.tolist()
    out, _ = documents._attend(torch.nn.Identity(), query, key, key, None, cu_seq_lens_q=bounds, max_length_q=6)
    assert out.shape == (1, 10, 4, 16)


def test_trap_6_adapters_take_inputs_as_they_come(tiny: Path, cache: Path) -> None:
    training = build_training(run_input(tiny, cache, spec_of(memory={"precision": "bf16"})))
    layer = training.model.base_model.model.model.layers[0].self_attn.q_proj
    seen: list[torch.dtype] = []
    layer.lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    hidden = torch.ones(1, 3, 64, dtype=torch.bfloat16)
    with training.compute(), training.adapters_uncast():
        layer(hidden)
    with training.compute():
        layer(hidden)
    assert seen == [torch.bfloat16, torch.float32], "the second is what peft does by itself"


def test_trap_9_an_adapter_without_a_gradient_under_checkpointing_would_be_noticed(tiny: Path, cache: Path) -> None:
    training = build_training(run_input(tiny, cache, spec_of(memory={"precision": "fp32", "checkpointing": True})))
    examples = training.rows.step_rows(1)
    training.loss(training.model, training.layout.collate(examples, training.device)).sums.sum().backward()
    assert all(parameter.grad is not None for _, parameter in training.trainable())
    assert any(bool(parameter.grad.any()) for _, parameter in training.trainable() if parameter.grad is not None)


def test_trap_10_compile_over_a_quantized_base_is_refused() -> None:
    with pytest.raises(ValidationError, match="every dequantized weight"):
        spec_of(quantization={"kind": "nf4"}, memory={"compile": True})


def test_trap_15_kernels_swapped_into_a_family_are_taken_out_again() -> None:
    family = ModuleType("family_of_this_test")
    sys.modules[family.__name__] = family
    family.rotary = original = object()  # type: ignore[attr-defined]
    model = type("Model", (), {"__module__": family.__name__})()

    def swap() -> None:
        family.rotary = object()  # type: ignore[attr-defined]
        raise PackingMismatch

    try:
        with pytest.raises(PackingMismatch), restored_on_failure(model):
            swap()
        assert family.rotary is original
    finally:
        del sys.modules[family.__name__]


def test_trap_16_no_logits_are_made_that_a_32_bit_index_could_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nats.LOGITS_PER_CHUNK < 2**31
    monkeypatch.setattr(nats, "LOGITS_PER_CHUNK", 4 * 512)
    head = torch.nn.Linear(8, 512)
    sizes: list[int] = []
    head.register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
    hidden, labels = torch.ones(11, 8), torch.arange(11)
    for recorded in (torch.enable_grad(), torch.no_grad()):
        with recorded:
            nats._head_nats(head, hidden, labels, type("Config", (), {"vocab_size": 512})())
    assert sizes
    assert max(sizes) <= nats.LOGITS_PER_CHUNK
