"""Optimizers and schedules: the values they promise, and a state that goes through tensors and numbers unharmed."""

import math
from typing import Any

import pytest
import torch

from core.spec import OptimSpec, ScheduleSpec
from core.train.optim import build_optimizer, learning_rate_factor, optimizer_state, restore_optimizer

CPU = torch.device("cpu")
KINDS = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def factors(total: int, **schedule: Any) -> list[float]:
    spec = ScheduleSpec(**schedule)
    return [learning_rate_factor(spec, step, total) for step in range(1, total + 1)]


def test_warmup_rises_evenly_to_one() -> None:
    assert factors(6, kind="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_starts_at_one_and_ends_above_zero() -> None:
    assert factors(6, kind="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_decay() -> None:
    expected = [1.0, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    assert factors(5, kind="cosine", warmup_steps=1) == pytest.approx(expected)


def test_a_run_of_warmup_alone() -> None:
    assert factors(3, kind="cosine", warmup_steps=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(96, 96)  # large enough for 8-bit states
        self.norm = torch.nn.LayerNorm(96)
        self.frozen = torch.nn.Parameter(torch.ones(3, 3), requires_grad=False)


def steps(model: Model, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(number))
        (model.norm(model.linear(x)) * x).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: Any) -> None:
    spec = OptimSpec(kind=kind, learning_rate=1e-2, weight_decay=0.1)
    straight = Model()
    optimizer = build_optimizer(straight.named_parameters(), spec, CPU)
    steps(straight, optimizer, range(3))
    weights = {name: p.detach().clone() for name, p in straight.named_parameters()}
    tensors, numbers = optimizer_state(straight.named_parameters(), optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if "8bit" in kind:
        assert tensors["linear.weight/state1"].dtype == torch.uint8
    steps(straight, optimizer, range(3, 6))

    resumed = Model()
    with torch.no_grad():
        for name, p in resumed.named_parameters():
            p.copy_(weights[name])
    fresh = build_optimizer(resumed.named_parameters(), spec, CPU)
    restore_optimizer(resumed.named_parameters(), fresh, tensors, numbers)
    steps(resumed, fresh, range(3, 6))
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_lowers_a_loss(kind: Any) -> None:
    model = Model()
    optimizer = build_optimizer(model.named_parameters(), OptimSpec(kind=kind, learning_rate=1e-2), CPU)
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model.norm(model.linear(x)) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Adapted(torch.nn.Module):
    """Named as peft names LoRA's matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(64, 8, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(8, 64, bias=False)})
        self.magnitude = torch.nn.Parameter(torch.ones(64))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_plus_moves_b_by_its_ratio_and_nothing_else(kind: Any) -> None:
    model = Adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model.named_parameters(), OptimSpec(kind=kind, learning_rate=1e-3), CPU, lora_plus_ratio=16.0)
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-3 * group["lr_scale"]
        group["lr"] = 5e-4 * group["lr_scale"]  # as the loop does at each step
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - p.detach()).mean().item() for name, p in model.named_parameters()}
    # The first step of Adam is the learning rate times the gradient's sign.
    assert moved == pytest.approx({"magnitude": 5e-4, "lora_A.default.weight": 5e-4, "lora_B.default.weight": 8e-3}, rel=1e-3)


def test_lora_plus_state_goes_through_tensors_unharmed() -> None:
    spec = OptimSpec(weight_decay=0.1)
    model = Adapted()
    optimizer = build_optimizer(model.named_parameters(), spec, CPU, lora_plus_ratio=4.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors, numbers = optimizer_state(model.named_parameters(), optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.step()

    resumed = Adapted()
    with torch.no_grad():
        for (name, p), source in zip(resumed.named_parameters(), model.parameters(), strict=True):
            p.copy_(weights[name])
            p.grad = source.grad.clone()
    fresh = build_optimizer(resumed.named_parameters(), spec, CPU, lora_plus_ratio=4.0)
    restore_optimizer(resumed.named_parameters(), fresh, tensors, numbers)
    fresh.step()
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_without_lora_plus_every_rate_is_the_same() -> None:
    optimizer = build_optimizer(Adapted().named_parameters(), OptimSpec(weight_decay=0.1), CPU)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_norms_and_biases_do_not_decay_and_frozen_weights_do_not_train() -> None:
    model = Model()
    optimizer = build_optimizer(model.named_parameters(), OptimSpec(weight_decay=0.1), CPU)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {
        id(model.linear.weight): 0.1,
        id(model.linear.bias): 0.0,
        id(model.norm.weight): 0.0,
        id(model.norm.bias): 0.0,
    }
