"""Weights in 8-bit floats on every tier: the same engine to the last place without rounding, and near with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from core.errors import BadSpec
from core.events import Started
from core.models.fp8 import PLAIN_8BIT, Linear8bit, Rounding, rows_unrounded, scaled_in_8_bits
from core.models.joined import EightBit
from core.models.load import dequantized_weight
from core.models.targets import find_targets
from core.train.fused import halves
from core.train.fused.elementwise import Elementwise
from core.train.fused.graphs import Recorder, Work
from core.train.fused.install import forget_graphs, install_fused, install_graphs, uninstall_fused
from tests.core.train.fused import (
    CPU,
    FAMILIES,
    Folders,
    adapted,
    apart,
    assert_same,
    base_of,
    folders_in,
    measured,
    memory,
)
from tests.core.train.runs import losses, run_input, spec_of, train_here

FP8: dict[str, Any] = {"kind": "fp8"}
FUSED: dict[str, Any] = {"precision": "fp32", "fused_layers": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return folders_in(tmp_path_factory.mktemp)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rounding_the_tiers_are_one_and_with_it_near(folders: Folders, family: str) -> None:
    model = adapted(base_of(folders(family), quantization="fp8"))
    before, rounded = memory(model), measured(model)
    with rows_unrounded(model):
        exact = measured(model)
    assert 1e-3 < apart(exact.gradients, rounded.gradients) < 0.2, "as far as rounding goes"
    install_fused(model)
    assert memory(model)[0] == before[0], "joined weights are no copies"
    fused = measured(model)
    assert apart(exact.gradients, fused.gradients) < 0.2
    torch.testing.assert_close(fused.sums, rounded.sums, rtol=1e-2, atol=0)
    with rows_unrounded(model):
        assert_same(measured(model), exact)
    uninstall_fused(model)
    assert memory(model) == before
    assert measured(model).equals(rounded), "as if nothing had been"


def test_without_rounding_a_model_is_the_one_of_its_dequantised_weights(folders: Folders) -> None:
    base = base_of(folders("qwen2"), quantization="fp8")
    plain = base_of(folders("qwen2"))
    for path, module in find_targets(base, "all-linear").items():
        assert isinstance(module, Linear8bit)
        plain.get_submodule(path).weight.data = dequantized_weight(module)
    torch.manual_seed(0)
    expected = measured(adapted(plain))
    torch.manual_seed(0)
    model = adapted(base)
    with rows_unrounded(model):
        assert_same(measured(model), expected)
    assert apart(expected.gradients, measured(model).gradients) < 0.2


@pytest.mark.parametrize("has_plus", [False, True])
@pytest.mark.parametrize("has_thin", [False, True])
def test_what_is_added_to_a_product_is_added_to_it(has_plus: bool, has_thin: bool) -> None:
    torch.manual_seed(0)
    layer = Linear8bit(torch.nn.Linear(64, 48, bias=False), CPU, Rounding())
    weight = EightBit(layer.matrix(), PLAIN_8BIT)
    x, gradient = torch.randn(7, 64), torch.randn(7, 48)
    plus = torch.randn(7, 48) if has_plus else None
    thin, thin_back = [(torch.randn(7, 3), torch.randn(3, width)) if has_thin else None for width in (48, 64)]
    before = None if plus is None else plus.clone()
    found, found_back = weight.multiply(x, plus, thin), weight.multiply_back(gradient, thin_back)
    expected, expected_back = weight.multiply(x, None), weight.multiply_back(gradient)
    if plus is not None and before is not None:
        assert torch.equal(plus, before), "it is its caller's"
        expected = expected + plus
    if thin is not None and thin_back is not None:
        expected, expected_back = expected + thin[0] @ thin[1], expected_back + thin_back[0] @ thin_back[1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_back, expected_back)


def test_graphs_of_what_was_not_rounded_are_forgotten(folders: Folders) -> None:
    recorded = []

    def recorder(device: torch.device) -> Recorder:
        def record(work: Work) -> Work:
            recorded.append(work)
            return work

        return record

    model = adapted(base_of(folders("llama"), quantization="fp8"))
    forget_graphs(model)
    install_fused(model)
    expected = measured(model)
    install_graphs(model, recorder)
    counts = []
    for _ in range(2):
        with rows_unrounded(model):
            measured(model)
            measured(model)
        forget_graphs(model)
        assert apart(expected.gradients, measured(model).gradients) < 1e-2  # a row of padding makes sums of another size
        counts.append(len(recorded))
    assert counts == [4, 6], "forward and backward, each before and after"


def test_recomputed_layers_round_as_they_did(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is rounded by itself, so that chunks of tokens change nothing; a chunk's matrices are turned over once."""
    turned = []

    def counted(codes: torch.Tensor) -> torch.Tensor:
        turned.append(codes.shape)
        return codes.t().contiguous()

    model = adapted(base_of(folders("llama"), quantization="fp8"))
    install_fused(model)
    expected = measured(model)
    uninstall_fused(model)
    monkeypatch.setattr(halves, "_CHUNK", 32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    install_fused(model, Elementwise(turned_over=counted))
    found = measured(model)
    assert apart(expected.gradients, found.gradients) < 1e-2  # sums of other sizes tip a few numbers over
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-4, atol=0)
    assert len(turned) == 2 * 4, "once for each matrix of two layers"


def test_a_run_learns_on_every_tier_and_resumes(tiny: Path, cache: Path, tmp_path: Path) -> None:
    plain_batch = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "packing": "off"}
    memory = FUSED | {"fused_layers": False}
    jobs = {
        "exact": spec_of(memory=memory),
        "plain": spec_of(quantization=FP8, memory=memory, batch=plain_batch),
        "packed": spec_of(quantization=FP8, memory=memory),
        "fused": spec_of(quantization=FP8, memory=FUSED, checkpoints={"every_steps": 3}),
    }
    runs = {name: train_here(run_input(tiny, cache, job), tmp_path / name) for name, job in jobs.items()}
    tiers = {name: next(event for event in events if isinstance(event, Started)) for name, events in runs.items()}
    for name in ("plain", "packed", "fused"):
        assert tiers[name].tier == name
        assert losses(runs[name]) == pytest.approx(losses(runs["exact"]), abs=0.02)
        assert losses(runs[name]) != losses(runs["exact"])
    assert "8-bit rows move the loss by" in tiers["fused"].tier_reason
    resumed = run_input(tiny, cache, jobs["fused"], resume_from=tmp_path / "fused/checkpoints/step-6")
    assert losses(train_here(resumed, tmp_path / "again")) == losses(runs["fused"])[6:], "bit for bit"


def test_a_model_that_rounding_takes_apart_is_refused(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = scaled_in_8_bits(x, factors)
        return codes, -scales

    monkeypatch.setattr("core.train.enter.PLAIN", Elementwise(scaled_in_8_bits=wrong))
    with pytest.raises(BadSpec, match=r"fp8 is too coarse for this model: .* gradients by \d.*; use nf4 or none"):
        train_here(run_input(tiny, cache, spec_of(quantization=FP8, memory=FUSED)), tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tuning": {"kind": "full"}}, "full tuning can't train quantized weights"),
        ({"tuning": {"kind": "lora", "dora": True}}, "dora reads .* which fp8 ones do not allow: use nf4 or fp4"),
        ({"tuning": {"kind": "lora", "train_embeddings": True}}, "train_embeddings with a quantized base"),
        ({"memory": {"precision": "fp16"}}, "fp8 with fp16 compute is not offered"),
        ({"memory": {"compile": True}}, "compile with a quantized base is not offered"),
    ],
)
def test_what_fp8_can_not_be_combined_with(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        spec_of(quantization=FP8, **change)
