"""The weights of linear layers that read one input, as one matrix that is multiplied in one go.

The layers stay what and where they are, and their names with them; only the memory under their weights changes: they become
views of the joined matrix, so that nothing is held twice and every other user of the layers finds what it knows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer

from core.models.fp8 import PLAIN_8BIT, Functions8bit, Matrix8bit, is_8bit, join_8bit, part_8bit
from core.models.nf4 import Joined4bit, is_4bit, join_4bit, part_4bit, why_not_joined

Thin = tuple[torch.Tensor, torch.Tensor]
"""An adapter's second product, [N, R] and [R, outputs], that is added to the large one."""


class Weight(Protocol):
    """A joined matrix W [outputs, inputs], whatever it is kept as."""

    def multiply(self, x: torch.Tensor, plus: torch.Tensor | None, thin: Thin | None = None) -> torch.Tensor:
        """x [N, inputs] -> x W^T + `plus`, [outputs] or [N, outputs], + `thin`, in the dtype of all of them."""
        ...

    def multiply_back(self, gradient: torch.Tensor, thin: Thin | None = None) -> torch.Tensor:
        """Gradient [N, outputs] -> gradient W [N, inputs] + `thin`."""
        ...

    def at_hand(self, dtype: torch.dtype) -> "Weight":
        """The same for several products in a row, as one matrix in `dtype` that lives as long as it is held."""
        ...


class _Multiplied(ABC):
    """As a matrix in the dtype of what it is multiplied with."""

    @abstractmethod
    def matrix(self, dtype: torch.dtype) -> torch.Tensor: ...

    def multiply(self, x: torch.Tensor, plus: torch.Tensor | None, thin: Thin | None = None) -> torch.Tensor:
        return _onto(plus, thin, x, self.matrix(x.dtype).t())

    def multiply_back(self, gradient: torch.Tensor, thin: Thin | None = None) -> torch.Tensor:
        return _onto(None, thin, gradient, self.matrix(gradient.dtype))

    def at_hand(self, dtype: torch.dtype) -> "Weight":
        return AtHand(self.matrix(dtype))


class Dense(_Multiplied):
    """Weights, or biases, that are kept as they are; they may be trained."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.joined = parameters[0].data
        if len(parameters) > 1:
            self.joined = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, self.joined.split([len(p) for p in parameters]), strict=True):
                parameter.data = part

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return self.joined.to(dtype)

    def trained(self) -> torch.Tensor | None:
        """The joined matrix with a way back to the parameters for its gradient; None where all are frozen."""
        if any(parameter.requires_grad for parameter in self.parameters):
            joined: torch.Tensor = _AsOne.apply(self.joined, *self.parameters)
            return joined
        return None

    def part(self) -> None:
        """Give the parameters memory of their own again."""
        if len(self.parameters) > 1:
            for parameter in self.parameters:
                parameter.data = parameter.data.clone()


class FourBit(_Multiplied):
    """Frozen weights in 4 bits: dequantised for every product, so that they are never whole for longer."""

    def __init__(self, joined: Joined4bit) -> None:
        self._joined = joined

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return self._joined.matrix(dtype)


class EightBit:
    """Frozen weights in 8-bit floats, multiplied as they are. On the way back they are needed turned over: made anew for every
    product, unless `keeps`."""

    def __init__(self, matrix: Matrix8bit, functions: Functions8bit, *, keeps: bool = False) -> None:
        self._matrix, self._functions, self._keeps = matrix, functions, keeps
        self._over: torch.Tensor | None = None

    def multiply(self, x: torch.Tensor, plus: torch.Tensor | None, thin: Thin | None = None) -> torch.Tensor:
        return _sum(self._matrix.multiply(x, quantise=self._functions.rows), plus, thin)

    def multiply_back(self, gradient: torch.Tensor, thin: Thin | None = None) -> torch.Tensor:
        over = self._functions.turned_over(self._matrix.codes) if self._over is None else self._over
        if self._keeps:
            self._over = over
        return _sum(self._matrix.multiply_back(gradient, over, quantise=self._functions.scaled), None, thin)

    def at_hand(self, dtype: torch.dtype) -> Weight:
        return EightBit(self._matrix, self._functions, keeps=True)


class AtHand(_Multiplied):
    """A matrix in the dtype that it is multiplied in."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        return self._matrix


def _onto(plus: torch.Tensor | None, thin: Thin | None, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The thin product first, which only moves bytes; the large one adds to it, and has time to read it as it computes."""
    if thin is None:
        return x @ matrix if plus is None else torch.addmm(plus, x, matrix)
    return (thin[0] @ thin[1] if plus is None else torch.addmm(plus, *thin)).addmm_(x, matrix)


def _sum(product: torch.Tensor, plus: torch.Tensor | None, thin: Thin | None) -> torch.Tensor:
    """The same where the large product can't add to anything: then the thin one adds to it."""
    if thin is not None:
        product.addmm_(*thin)
    return product if plus is None else product.add_(plus)


class _AsOne(torch.autograd.Function):
    """Parameters that are views of one matrix -> that matrix; its gradient is cut into theirs, without a copy."""

    @staticmethod
    def forward(ctx: Any, joined: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.rows = [len(parameter) for parameter in parameters]
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = zip(gradient.split(ctx.rows), ctx.needs_input_grad[1:], strict=True)
        return None, *(part if wanted else None for part, wanted in parts)


def plain_layer(module: torch.nn.Module) -> torch.nn.Linear:
    """The linear layer itself, with or without an adapter on it."""
    layer: torch.nn.Linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return layer


def why_not_one(modules: Sequence[torch.nn.Module]) -> str | None:
    """What keeps linear layers from being one matrix; None where nothing does."""
    layers = [plain_layer(module) for module in modules]
    if len({layer.bias is None for layer in layers}) > 1:
        return "some of its layers have a bias and others have none"
    if all(map(is_4bit, layers)):
        return why_not_joined(layers)
    if all(map(is_8bit, layers)):
        return None
    if kinds := {type(layer).__name__ for layer in layers if type(layer) is not torch.nn.Linear}:
        return f"its weights are kept in a {' and a '.join(sorted(kinds))}"
    if len({layer.weight.dtype for layer in layers}) > 1:
        return "weights that read one input differ in dtype"
    return None


def join_weights(modules: Sequence[torch.nn.Module], functions: Functions8bit = PLAIN_8BIT) -> tuple[Weight, Dense | None]:
    """(weight, bias) of linear layers, or of LoRA layers on them; `functions` are for weights in 8-bit floats.

    Raises ValueError where `why_not_one` has a reason.
    """
    if reason := why_not_one(modules):
        raise ValueError(reason)
    layers: list[Any] = [plain_layer(module) for module in modules]
    bias = None if layers[0].bias is None else Dense([layer.bias for layer in layers])
    if is_4bit(layers[0]):
        return FourBit(join_4bit(layers)), bias
    if is_8bit(layers[0]):
        return EightBit(join_8bit(layers), functions), bias
    return Dense([layer.weight for layer in layers]), bias


def part_weights(modules: Sequence[torch.nn.Module], weight: Weight, bias: Dense | None) -> None:
    """Undo `join_weights`."""
    if bias is not None:
        bias.part()
    if isinstance(weight, Dense):
        weight.part()
    elif len(modules) > 1:
        layers: list[Any] = [plain_layer(module) for module in modules]
        part_4bit(layers) if isinstance(weight, FourBit) else part_8bit(layers)
