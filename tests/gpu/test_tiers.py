"""bf16 on a GPU: one gradient however a step is cut, rows that don't see each other, both tiers for every family."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.catalog import FAMILIES, can_pack
from core.eval.layout import Layout, Packed, Padded
from core.eval.rows import Example, collate_packed
from core.model_folder import read_model_facts
from core.models.documents import DOCUMENTS
from core.train.build import build_training
from core.train.tier import Probe, enter_packed, measure
from core.train.training import Training
from tests.core.models.test_families import SETTINGS
from tests.core.train.runs import losses, spec_of, train_here
from tests.gpu.conftest import kernels_taken_out, on_gpu
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu

BF16: dict[str, Any] = {"precision": "bf16"}
ROUNDING = 2e-2
"""Relative distance of two bf16 gradients of one step; a step's other half is 1 away."""
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 1e-3}},
    "qlora": {"quantization": {"kind": "nf4"}},
}


def plain_training(tiny: Path, cache: Path, **changes: Any) -> Training:
    batch = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "packing": "off"}
    training = build_training(on_gpu(tiny, cache, spec_of(memory=BF16, batch=batch, **changes)))
    with torch.no_grad():  # an adapter that has learned something: with B at zero A has no gradient
        for name, parameter in training.trainable():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return training


def measured(training: Training, layout: Layout, examples: list[Example]) -> Probe:
    with training.adapters_uncast():
        return measure(training.model, examples, layout, loss=training.loss, device=training.device, compute=training.compute)


def apart(one: Probe, other: Probe) -> float:
    assert one.gradients.keys() == other.gradients.keys()
    norm = sum(float(g.pow(2).sum()) for g in one.gradients.values()) ** 0.5
    assert norm > 0
    return sum(float((other.gradients[name] - g).pow(2).sum()) for name, g in one.gradients.items()) ** 0.5 / norm


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("rows", [8, 5], ids=["a whole step", "the short last one"])
def test_a_step_has_one_gradient_however_it_is_cut(tiny: Path, cache: Path, tuning: str, rows: int) -> None:
    training = plain_training(tiny, cache, **TUNINGS[tuning])
    examples = training.rows.step_rows(1)[:rows]
    whole = measured(training, Padded(8), examples)
    cut = {size: apart(whole, measured(training, Padded(size), examples)) for size in (1, 2, 4)}
    enter_packed(training.model, training.device)
    cut |= {f"packed {size}": apart(whole, measured(training, Packed(size), examples)) for size in (4096, 40)}
    assert max(cut.values()) < ROUNDING


def test_no_row_sees_another(tiny: Path, cache: Path, cuda: torch.device) -> None:
    training = plain_training(tiny, cache)
    enter_packed(training.model, training.device)
    rng = np.random.default_rng(1)
    first, middle, last, other = (rng.integers(3, 300, length).astype(np.int32) for length in (17, 30, 9, 30))

    def hidden(*rows: np.ndarray) -> torch.Tensor:
        batch = collate_packed([Example(((row, np.ones(len(row), np.uint8)),)) for row in rows], cuda)
        assert batch.documents is not None
        decoder = training.model.get_base_model().get_decoder()
        with torch.no_grad(), training.compute():
            said = decoder(input_ids=batch.input_ids, use_cache=False, **batch.documents.attention_arguments())
        found: torch.Tensor = said.last_hidden_state[0]
        return found

    before, after = hidden(first, middle, last), hidden(first, other, last)
    assert torch.equal(before[:17], after[:17])
    assert torch.equal(before[47:], after[47:])
    assert not torch.equal(before[17:47], after[17:47])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_packs_or_says_why_not(architecture: str, cache: Path, tmp_path: Path) -> None:
    family = FAMILIES[architecture].name
    model = build_tiny_model(tmp_path / "model", family=family, initializer_range=0.1, **SETTINGS.get(family, {}))
    spec = spec_of(memory=BF16, schedule={"max_steps": 3})
    off = spec_of(memory=BF16, schedule={"max_steps": 3}, batch=spec.batch.model_dump() | {"packing": "off"})
    plain = losses(train_here(on_gpu(model, cache, off), tmp_path / "plain"))
    events = train_here(on_gpu(model, cache, spec), tmp_path / "run")
    (started,) = (event for event in events if event.kind == "started")
    obstacle = can_pack(architecture, read_model_facts(model).config, spec.data.max_length)
    assert started.tier == ("packed" if obstacle is None else "plain")
    assert [event.code for event in events if event.kind == "warning"] == []
    assert losses(events) == pytest.approx(plain, abs=3e-2)


@pytest.mark.parametrize(
    "memory",
    [
        {"checkpointing": True},
        {"checkpointing": True, "checkpointing_every": 2},
        {"checkpointing": True, "checkpointing_offload": True},
        {"compile": True},
        {"fused_layers": True},
        {"fused_layers": True, "checkpointing": True},
        {"fused_layers": True, "checkpointing": True, "checkpointing_offload": True},
    ],
    ids=["checkpointing", "every-second", "offload", "compile", "fused", "fused-checkpointing", "fused-offload"],
)
def test_a_lever_of_memory_changes_no_loss(tiny: Path, cache: Path, tmp_path: Path, memory: dict[str, Any]) -> None:
    series = []
    for name, change in {"without": {}, "with": memory}.items():
        with kernels_taken_out():
            series.append(losses(train_here(on_gpu(tiny, cache, spec_of(memory=BF16 | change)), tmp_path / name)))
    assert series[1] == pytest.approx(series[0], abs=2e-2)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_bitsandbytes_optimizers_learn_what_adamw_learns(tiny: Path, cache: Path, tmp_path: Path, optimizer: str) -> None:
    series = [
        losses(
            train_here(on_gpu(tiny, cache, spec_of(memory=BF16, optim={"learning_rate": 5e-3, "kind": kind})), tmp_path / kind)
        )
        for kind in ("adamw", optimizer)
    ]
    assert series[0][-1] < series[0][0] - 0.05
    assert series[1] == pytest.approx(series[0], abs=5e-2)


def test_fp16_scales_its_gradients_and_learns(tiny: Path, cache: Path, tmp_path: Path) -> None:
    fp16, bf16 = (
        train_here(on_gpu(tiny, cache, spec_of(memory={"precision": precision})), tmp_path / precision)
        for precision in ("fp16", "bf16")
    )
    assert losses(fp16) == pytest.approx(losses(bf16), abs=5e-2)


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"fused_layers": True},
        {"fused_layers": True, "checkpointing": True},
        {"fused_layers": True, "checkpointing": True, "checkpointing_offload": True},
    ],
    ids=["packed", "fused", "fused-checkpointing", "fused-offload"],
)
def test_trap_5_no_micro_batch_waits_for_the_gpu(tiny: Path, cache: Path, memory: dict[str, Any]) -> None:
    training = build_training(on_gpu(tiny, cache, spec_of(memory=BF16 | memory)))
    assert training.choice.tier == ("fused" if memory else "packed")
    examples = training.rows.step_rows(1)
    assert training.model.get_base_model().config._attn_implementation == DOCUMENTS

    def passed() -> torch.Tensor:
        with training.adapters_uncast():
            batch = training.layout.collate(examples, training.device)
            with training.compute():
                sums = training.loss(training.model, batch).sums
            sums.sum().backward()
        return sums

    passed()  # what a size of batch is recorded with
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = passed()
        with pytest.raises(RuntimeError, match="synchronizing"):
            sums.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(p.grad is not None and bool(p.grad.any()) for _, p in training.trainable())
