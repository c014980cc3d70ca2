"""The weights of linear layers that read one input, as one matrix that is multiplied in one go.

The layers stay what and where they are, and their names with them; only the memory under their weights changes: they become
views of the joined matrix, so that nothing is held twice and every other user of the layers finds what it knows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

from core.models.nf4 import Joined4bit, is_4bit, join_4bit, part_4bit, why_not_joined


class Weight(Protocol):
    """A joined matrix, whatever it is kept as."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [N, inputs], bias [outputs] -> x W^T + bias [N, outputs], in the dtype of both."""
        ...

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient [N, outputs] -> gradient W [N, inputs]."""
        ...

    def at_hand(self, dtype: torch.dtype) -> "Weight":
        """The same for several products in a row, as one matrix in `dtype` that lives as long as it is held."""
        ...


class Dense:
    """Weights, or biases, that are kept as they are; they may be trained."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.joined = parameters[0].data
        if len(parameters) > 1:
            self.joined = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, self.joined.split([len(p) for p in parameters]), strict=True):
                parameter.data = part

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.joined.to(x.dtype), bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ self.joined.to(gradient.dtype)

    def at_hand(self, dtype: torch.dtype) -> "Weight":
        return AtHand(self.joined.to(dtype))

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


class FourBit:
    """Frozen weights in 4 bits: dequantised for every product, so that they are never whole for longer."""

    def __init__(self, joined: Joined4bit) -> None:
        self._joined = joined

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._joined.multiply(x, bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._joined.multiply_back(gradient)

    def at_hand(self, dtype: torch.dtype) -> Weight:
        return AtHand(self._joined.matrix(dtype))


class AtHand:
    """A matrix in the dtype that it is multiplied in."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self._matrix, bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient @ self._matrix

    def at_hand(self, dtype: torch.dtype) -> Weight:
        return self


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
    if any(type(layer) is not torch.nn.Linear for layer in layers):
        return f"its weights are kept in a {type(layers[0]).__name__}"
    if len({layer.weight.dtype for layer in layers}) > 1:
        return "weights that read one input differ in dtype"
    return None


def join_weights(modules: Sequence[torch.nn.Module]) -> tuple[Weight, Dense | None]:
    """(weight, bias) of linear layers, or of LoRA layers on them. Raises ValueError where `why_not_one` has a reason."""
    if reason := why_not_one(modules):
        raise ValueError(reason)
    layers = [plain_layer(module) for module in modules]
    bias = None if layers[0].bias is None else Dense([layer.bias for layer in layers])
    return (FourBit(join_4bit(layers)) if is_4bit(layers[0]) else Dense([layer.weight for layer in layers])), bias


def part_weights(modules: Sequence[torch.nn.Module], weight: Weight, bias: Dense | None) -> None:
    """Undo `join_weights`."""
    if bias is not None:
        bias.part()
    if isinstance(weight, Dense):
        weight.part()
    elif len(modules) > 1:
        part_4bit([plain_layer(module) for module in modules])
