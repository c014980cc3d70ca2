"""Frozen linear layers in 8-bit floats (e4m3 of arXiv 2209.05433), multiplied as such. Experimental.

Twice the rate of bf16 where the hardware multiplies 8-bit floats, for a byte a weight. Both factors of a product are rounded:
weights once, at load, with a scale for each output; what meets them in every pass, with a scale for each token, so that no row
depends on what it is computed together with. No weight trains and no weight's gradient is made; adapters beside them see
everything in the compute dtype. Gradients are e4m3 too: a row that is scaled by its own largest number needs e4m3's third bit
more than the range of e5m2.

A CPU multiplies the same rounded numbers in fp32, which is the reference: slow, and for tests and small models. N is tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from core.errors import BadSpec

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_LEAST = 1e-30
"""A row of nothing has a scale too."""
_WHOLE = 16
"""Both sides of a matrix that the hardware takes are whole numbers of these; what isn't stays as it is, on every device."""


def rows_in_8_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, I] -> (e4m3 [N, I], fp32 scales [N, 1]): their product is x again, rounded."""
    # A product, which every device rounds alike; a GPU makes another of a division by a number.
    scales = x.abs().amax(-1, keepdim=True).float().clamp(min=_LEAST) * (1 / _LARGEST)
    return (x / scales).to(_E4M3).contiguous(), scales


def scaled_in_8_bits(x: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of x with its columns times fp32 `factors` [I]. A function of its own, as a compiler makes few of each."""
    return rows_in_8_bits(x * factors)


def turned_over(codes: torch.Tensor) -> torch.Tensor:
    """[O, I] -> [I, O], in memory too. It reads bytes across rows, at which only a compiled one is fast."""
    return codes.t().contiguous()


@dataclass(frozen=True)
class Functions8bit:
    """What is done beside products; a faster one of its kind may take the place of each."""

    rows: Callable[..., Any] = rows_in_8_bits
    scaled: Callable[..., Any] = scaled_in_8_bits
    turned_over: Callable[..., Any] = turned_over


PLAIN_8BIT = Functions8bit()


@dataclass(eq=False)
class Rounding:
    """Of what meets the weights of a model; all its layers share one."""

    is_on: bool = True


@dataclass(frozen=True, eq=False)
class Matrix8bit:
    """Weights of layers with I inputs and, together, O outputs."""

    codes: torch.Tensor  # the bytes of e4m3, uint8 [O, I]
    scales: torch.Tensor  # fp32 [O]
    rounding: Rounding

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, quantise: Callable[..., Any] = rows_in_8_bits
    ) -> torch.Tensor:
        """x [N, I] -> x W^T + bias [N, O] in x's dtype. Not followed by autograd. `quantise` may be a faster one of its kind."""
        if not self.rounding.is_on:
            return linear(x, self.dequantized().to(x.dtype), bias)
        rows, of_rows = quantise(x)
        found = _product(rows, of_rows, self.codes, self.scales, x.dtype)
        return found if bias is None else found.add_(bias)

    def multiply_back(
        self, gradient: torch.Tensor, over: torch.Tensor, *, quantise: Callable[..., Any] = scaled_in_8_bits
    ) -> torch.Tensor:
        """Gradient [N, O] -> gradient W [N, I]; `over` is `turned_over(codes)`. Not followed by autograd.

        The sum runs over outputs, each of which has a scale of its own: they go into the gradient before it is rounded, and
        what is left of the weight is its codes. The hardware wants both factors with the sum's numbers side by side, hence
        `over`: made for each product it moves two bytes a weight, by count a fiftieth of a step; kept it would take one more.
        """
        if not self.rounding.is_on:
            return gradient @ self.dequantized().to(gradient.dtype)
        rows, of_rows = quantise(gradient, self.scales)
        ones = torch.ones(len(over), device=over.device)
        return _product(rows, of_rows, over, ones, gradient.dtype)

    def dequantized(self) -> torch.Tensor:
        """fp32 [O, I]."""
        return self.codes.view(_E4M3).float().mul_(self.scales[:, None])


class Linear8bit(torch.nn.Linear):
    """A frozen linear layer, rounded from one in full precision; nothing of that one is kept but its bias."""

    scales: torch.Tensor

    def __init__(self, full: torch.nn.Linear, device: torch.device, rounding: Rounding) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = full.in_features, full.out_features
        codes, scales = rows_in_8_bits(full.weight.detach().to(device))
        # Bytes, as 4-bit weights are: peft gives new adapters the dtype of a weight that is a float.
        self.weight = torch.nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.register_buffer("scales", scales[:, 0], persistent=False)
        self.bias = full.bias
        self.rounding = rounding

    def matrix(self) -> Matrix8bit:
        return Matrix8bit(self.weight.data, self.scales, self.rounding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., I] -> [.., O] in autocast's dtype or, without it, x's."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        found: torch.Tensor = _Multiply.apply(x.to(dtype).flatten(0, -2), self.matrix(), bias)
        return found.unflatten(0, x.shape[:-1])


def check_8bit(device: torch.device, compute: torch.dtype) -> None:
    """Raises BadSpec for a GPU that doesn't multiply 8-bit floats, and for results that it doesn't give."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise BadSpec(
            f"quantization.kind: fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper), not {name} "
            f"({capability[0]}.{capability[1]}): use nf4 or none"
        )
    if compute != torch.bfloat16:
        raise BadSpec("quantization.kind: fp8 multiplies into bf16 on a GPU: set memory.precision bf16 or auto")


def to_8bit(model: Any, device: torch.device) -> None:
    """Round the linear layers of a model but its head, and move it to `device`, one layer after the other.

    So the device never holds more than the result and one weight in full.
    """
    head, rounding = model.get_output_embeddings(), Rounding()
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head and _is_whole(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Linear8bit(module, device, rounding))
    model.to(device)


@contextlib.contextmanager
def rows_unrounded(model: Any) -> Iterator[None]:
    """Around passes that multiply the rounded weights with all else as it is; nothing changes where no layer is in 8 bits.

    Two engines are compared so. A difference in the last place of bf16 tips numbers over from one e4m3 to the next, which lie
    16 times as far apart, and layer by layer more of them, until the gradients of two right engines have little in common.
    Rounding itself is the same function in both.
    """
    found = {layer.rounding for layer in model.modules() if isinstance(layer, Linear8bit)}
    for rounding in found:
        rounding.is_on = False
    try:
        yield
    finally:
        for rounding in found:
            rounding.is_on = True


def is_8bit(layer: torch.nn.Module) -> bool:
    return isinstance(layer, Linear8bit)


def join_8bit(layers: Sequence[Linear8bit]) -> Matrix8bit:
    """Lay the codes and scales of layers with the same inputs end to end; the layers hold views of them from then on.

    `part_8bit` undoes it.
    """
    if len(layers) == 1:
        return layers[0].matrix()
    rows = [layer.out_features for layer in layers]
    codes, scales = ([layer.weight.data for layer in layers], [layer.scales for layer in layers])
    joined = Matrix8bit(torch.cat(codes), torch.cat(scales), layers[0].rounding)
    for layer, code_part, scale_part in zip(layers, joined.codes.split(rows), joined.scales.split(rows), strict=True):
        layer.weight.data, layer.scales = code_part, scale_part
    return joined


def part_8bit(layers: Sequence[Linear8bit]) -> None:
    """Give layers that were joined memory of their own again."""
    for layer in layers:
        layer.weight.data, layer.scales = layer.weight.data.clone(), layer.scales.clone()


class _Multiply(torch.autograd.Function):
    """x W^T + bias, with nothing kept for the way back but the weight, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: Matrix8bit, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.multiply(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        matrix: Matrix8bit = ctx.matrix
        return matrix.multiply_back(gradient, turned_over(matrix.codes)), None, None


def _product(
    rows: torch.Tensor, of_rows: torch.Tensor, codes: torch.Tensor, of_codes: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(rows * of_rows) (codes * of_codes)^T: e4m3 [N, K], fp32 [N, 1], uint8 [M, K], fp32 [M] -> [N, M]."""
    weight = codes.view(_E4M3)
    if rows.device.type != "cuda":
        return linear(rows.float() * of_rows, weight.float() * of_codes[:, None]).to(dtype)
    # With a scale for each row the hardware's results are bf16. Its fast sums keep some 14 bits, the factors have four.
    found: torch.Tensor = torch._scaled_mm(
        rows, weight.t(), scale_a=of_rows, scale_b=of_codes[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return found.to(dtype)


def _is_whole(layer: torch.nn.Linear) -> bool:
    return layer.in_features % _WHOLE == 0 and layer.out_features % _WHOLE == 0
