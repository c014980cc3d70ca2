"""Tiny models with adapters for tests of fused layers: what they compute, and what they keep for the backward pass."""

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file

from core.adapter import Quantization
from core.eval.rows import Example, MicroBatch, collate_packed
from core.models.adapt import attach_adapter
from core.models.documents import DOCUMENTS
from core.models.load import ComputeDtype, load_base
from core.spec import LoraTuning, MoraTuning, SftObjective
from core.train.losses import token_loss
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "qwen3", "glm", "glm4")
LORA = LoraTuning(rank=4)
Folders = Callable[..., Path]


def folders_in(make: Callable[[str], Path]) -> Folders:
    """(model_type, what is special about it) -> its tiny model, in a folder that `make` gives by name."""
    built: dict[str, Path] = {}

    def folder(family: str, **settings: Any) -> Path:
        key = json.dumps([family, settings])
        if key not in built:
            path = make(family) / "model"
            built[key] = build_tiny_model(path, family=family, **{"initializer_range": 0.1} | settings)
            _unlike(built[key])
        return built[key]

    return folder


def _unlike(folder: Path) -> None:
    """Norms of 1 and biases of 0 would hide that they are left out."""
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(5)
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor += 0.2 * torch.randn(tensor.shape, generator=random)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def base_of(folder: Path, precision: ComputeDtype = "fp32", quantization: Quantization = "none") -> Any:
    loaded = load_base(folder, name="t", weights="0" * 64, quantization=quantization, precision=precision, device=CPU)
    return loaded.model


def adapted(base: Any, tuning: LoraTuning | MoraTuning = LORA) -> Any:
    """In training mode with packed attention, every B (or square) random."""
    model = attach_adapter(base, tuning, "t")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return packed(model)


def packed(model: Any) -> Any:
    (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation(DOCUMENTS)
    return model.train()


def examples(seed: int = 3, count: int = 6, longest: int = 40) -> list[Example]:
    rng = np.random.default_rng(seed)
    lengths = [longest, *rng.integers(4, longest + 1, count - 1)]
    ids = [rng.integers(3, 400, length).astype(np.int32) for length in lengths]
    return [Example(((row, (np.arange(len(row)) >= len(row) // 3).astype(np.uint8)),)) for row in ids]


@contextlib.contextmanager
def as_in_training(model: Any, precision: ComputeDtype) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if precision != "fp32":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if hasattr(model, "peft_config"):
                stack.enter_context(disable_input_dtype_casting(model))
        yield


@dataclass(frozen=True)
class Found:
    sums: torch.Tensor  # of each example
    gradients: dict[str, torch.Tensor]

    def equals(self, other: "Found") -> bool:
        assert self.gradients.keys() == other.gradients.keys()
        same = [torch.equal(self.gradients[name], other.gradients[name]) for name in self.gradients]
        return torch.equal(self.sums, other.sums) and all(same)


def measured(model: Any, precision: ComputeDtype = "fp32", batch: MicroBatch | None = None) -> Found:
    batch = collate_packed(examples(), CPU) if batch is None else batch
    with as_in_training(model, precision):
        sums = token_loss(model, batch, SftObjective()).sums
    (sums * torch.linspace(0.5, 1.5, len(sums))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Found(sums.detach(), gradients)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    norm = sum(float(g.double().pow(2).sum()) for g in one.values())
    return float((sum(float((other[name] - g).double().pow(2).sum()) for name, g in one.items()) / norm) ** 0.5)


def assert_same(found: Found, expected: Found) -> None:
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-5, atol=0)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.norm() > 0, name
        assert (found.gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def memory(model: Any) -> tuple[int, int]:
    """(bytes, pieces of memory) of all weights and their statistics."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]:
        tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values()), len(sizes)


class Flash(torch.autograd.Function):
    """Keeps what a flash attention keeps: its inputs, its result and a number for each head and token."""

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        query = parts[0]
        result = query.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(*parts, result, query.new_empty(query.shape[1:3], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(part) for part in ctx.saved_tensors[:3])


@dataclass(eq=False)
class _Held:
    tensor: torch.Tensor


def kept(model: Any, tokens: int, precision: ComputeDtype | None = None) -> int:
    """Bytes that the decoder keeps for its backward pass over one row, weights apart. None is the precision of its weights."""
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()  # a detached branch saves, and drops again
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    row = (np.full(tokens, 7, np.int32), np.ones(tokens, np.uint8))
    batch = collate_packed([Example((row,))], CPU)
    assert batch.documents is not None
    if precision is None:
        precision = "fp32" if model.dtype == torch.float32 else "bf16"
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()
    with as_in_training(model, precision), torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        hidden = decoder(input_ids=batch.input_ids, use_cache=False, **batch.documents.attention_arguments())
    storages = [held.tensor.untyped_storage() for held in alive]
    seen = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    del hidden
    return sum(seen.values())
