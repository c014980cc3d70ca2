"""Fused layers and joined 4-bit weights as a GPU computes them."""

from pathlib import Path

import pytest
import torch
from peft.helpers import disable_input_dtype_casting

pytest.importorskip("triton", reason="kernels are Triton's, which comes with torch for a GPU")

from core.adapter import Quantization
from core.eval.rows import collate_packed
from core.models.adapt import attach_adapter
from core.models.documents import DOCUMENTS
from core.models.load import load_base
from core.models.nf4 import join_4bit
from core.spec import LoraTuning, SftObjective
from core.train.fused.gpu import ON_GPU
from core.train.fused.install import install_fused, install_graphs, uninstall_fused
from core.train.fused.offload import HostStreams
from core.train.losses import token_loss
from tests.core.models.test_nf4 import KINDS, TOY, WHOLE, layers_of, own
from tests.core.train.fused import FAMILIES, Found, apart, examples
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("outputs", [TOY, WHOLE], ids=["toy", "whole"])
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_joined_matrix_is_the_layers_own(cuda: torch.device, kind: str, double: bool, outputs: tuple[int, ...]) -> None:
    layers = [layer.to(cuda) for layer in layers_of(outputs, kind, double)]
    before = own(layers)
    joined = join_4bit(layers)
    assert torch.equal(joined.matrix(torch.float32), before)
    assert torch.equal(own(layers), before), "the layers read the same through their views"


@pytest.mark.parametrize("layers", [1, 6])
def test_what_waits_in_the_host_comes_back_as_it_was(cuda: torch.device, layers: int) -> None:
    """However the copies fall: each tensor's memory is written over by the next as soon as it is let go."""
    host = HostStreams(cuda)
    places = [host.new_place() for _ in range(2 * layers)]
    for size in (1 << 20, 1 << 24, 1 << 22):
        expected = [float(size % 97 + number) for number in places]
        for number, value in zip(places, expected, strict=True):
            stream = torch.full((size,), value, dtype=torch.bfloat16, device=cuda)
            host.send(number, stream)
            del stream
        found = []
        for number in reversed(places):
            back = host.fetch(number)
            found.append((back.amin(), back.amax()))
            back.zero_()
            del back
        expected = [float(torch.tensor(value, dtype=torch.bfloat16)) for value in expected]
        assert [(float(low), float(high)) for low, high in reversed(found)] == [(value, value) for value in expected]


def test_streams_in_the_host_leave_the_gpu(cuda: torch.device) -> None:
    host, size = HostStreams(cuda), 1 << 24
    places = [host.new_place() for _ in range(12)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for number in places:
        host.send(number, torch.ones(size, dtype=torch.bfloat16, device=cuda))
    for number in reversed(places):
        host.fetch(number).add_(1)
    assert torch.cuda.max_memory_allocated() - before <= 4 * 2 * size


def test_graphs_of_many_sizes_share_one_memory(cuda: torch.device, tmp_path: Path) -> None:
    """Larger and smaller batches in turn, several a step: each is what it is kernel by kernel, and memory grows by one batch."""
    folder = build_tiny_model(tmp_path / "model", family="llama", initializer_range=0.1)
    base = load_base(folder, name="t", weights="0" * 64, quantization="none", precision="bf16", device=cuda).model
    model = attach_adapter(base, LoraTuning(rank=4), "t")
    model.get_base_model().set_attn_implementation(DOCUMENTS)
    model.train()
    install_fused(model, ON_GPU)
    batches = [
        collate_packed(examples(seed, count), cuda) for seed, count in ((1, 6), (2, 60), (3, 20), (4, 90), (5, 3), (6, 90))
    ]

    def step() -> dict[str, torch.Tensor]:
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16), disable_input_dtype_casting(model):
                token_loss(model, batch, SftObjective()).sums.sum().backward()
        found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    expected = step()
    install_graphs(model)
    for _ in range(3):
        assert apart(expected, step()) < 1e-2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_learn_what_the_packed_tier_learns(
    cuda: torch.device, tmp_path: Path, family: str, quantization: Quantization
) -> None:
    folder = build_tiny_model(tmp_path / "model", family=family, initializer_range=0.1)
    options = {"name": "t", "weights": "0" * 64, "quantization": quantization, "device": cuda}

    def model_in(precision: str) -> torch.nn.Module:
        torch.manual_seed(0)
        model = attach_adapter(load_base(folder, precision=precision, **options).model, LoraTuning(rank=4), "t")
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
        model.get_base_model().set_attn_implementation(DOCUMENTS)
        return model.train()

    def measured(model: torch.nn.Module) -> Found:
        batch = collate_packed(examples(), cuda)
        with torch.autocast("cuda", torch.bfloat16), disable_input_dtype_casting(model):
            sums = token_loss(model, batch, SftObjective()).sums
            sums.sum().backward()
        gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return Found(sums.detach(), gradients)

    model = model_in("bf16")
    packed = measured(model)
    install_fused(model, ON_GPU)
    fused = measured(model)
    install_graphs(model)
    for _ in range(3):
        recorded = measured(model)
        assert apart(fused.gradients, recorded.gradients) < 1e-2
        torch.testing.assert_close(recorded.sums, fused.sums, rtol=1e-3, atol=0)
    uninstall_fused(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for offload in (False, True):
        install_fused(model, ON_GPU, offload=offload)
        recomputed = measured(model)
        uninstall_fused(model)
        assert apart(fused.gradients, recomputed.gradients) < 1e-2  # attention's backward pass adds in any order
        torch.testing.assert_close(recomputed.sums, fused.sums, rtol=1e-3, atol=0)
    model.gradient_checkpointing_disable()
    again = measured(model)
    distance = apart(packed.gradients, fused.gradients)
    assert distance < 3e-2
    torch.testing.assert_close(fused.sums, packed.sums, rtol=1e-2, atol=0)
    torch.testing.assert_close(again.sums, packed.sums, rtol=1e-6, atol=0)
