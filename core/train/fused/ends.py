"""What stands before and after a matrix product of a decoder layer, and the way back through it.

Both ends of one autograd function (`projection.py`): they say what has to be kept between the passes, nothing else is. N is
tokens, D a head's size.
"""

from typing import Any, Protocol

import torch

from core.train.fused.elementwise import Elementwise

Kept = tuple[torch.Tensor, ...]


class Before(Protocol):
    """From what a projection reads to what is multiplied."""

    needs_input: bool
    """Whether the way back asks for the input."""

    @property
    def scale(self) -> torch.Tensor | None:
        """A parameter that takes part."""
        ...

    def forward(self, x: torch.Tensor, scale: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what is multiplied, in `dtype`; what is kept beside x)."""
        ...

    def again(self, x: torch.Tensor, scale: Any, kept: Any, dtype: torch.dtype) -> torch.Tensor:
        """What is multiplied, made once more."""
        ...

    def backward(self, gradient: torch.Tensor, x: Any, scale: Any, kept: Any, further: Any) -> torch.Tensor:
        """Gradient of x; `further`, if any, is another one that is added."""
        ...

    def backward_scale(self, gradient: torch.Tensor, x: Any, scale: Any, kept: Any) -> torch.Tensor | None:
        """Gradient of `scale`."""
        ...


class Straight:
    """Nothing stands before the product."""

    needs_input = False
    scale = None

    def forward(self, x: torch.Tensor, scale: None, dtype: torch.dtype) -> tuple[torch.Tensor, None]:
        return x.to(dtype), None

    def again(self, x: torch.Tensor, scale: None, kept: None, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype)

    def backward(self, gradient: torch.Tensor, x: Any, scale: None, kept: None, further: Any) -> torch.Tensor:
        return gradient if further is None else gradient + further

    def backward_scale(self, gradient: torch.Tensor, x: Any, scale: None, kept: None) -> None:
        return None


class Norm:
    """RMSNorm, as the module of the model has it."""

    needs_input = True

    def __init__(self, module: Any, ops: Elementwise) -> None:
        self._module, self._ops = module, ops

    @property
    def scale(self) -> torch.Tensor:
        weight: torch.Tensor = self._module.weight
        return weight

    def forward(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self._ops.normed(x, scale, self._module.variance_epsilon, dtype)
        return found

    def again(self, x: torch.Tensor, scale: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._ops.normed_again(x, scale, kept, dtype)

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, kept: torch.Tensor, further: Any
    ) -> torch.Tensor:
        return self._ops.normed_back(gradient, x, scale, kept, further)

    def backward_scale(self, gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._ops.normed_back_scale(gradient, x, kept)
        return found.to(scale.dtype)


class Gate:
    """SwiGLU: the input is gate and up side by side."""

    needs_input = True
    scale = None

    def __init__(self, ops: Elementwise) -> None:
        self._ops = ops

    def forward(self, x: torch.Tensor, scale: None, dtype: torch.dtype) -> tuple[torch.Tensor, None]:
        return self._ops.gated(x, dtype), None

    def again(self, x: torch.Tensor, scale: None, kept: None, dtype: torch.dtype) -> torch.Tensor:
        return self._ops.gated(x, dtype)

    def backward(self, gradient: torch.Tensor, x: torch.Tensor, scale: None, kept: None, further: Any) -> torch.Tensor:
        self._ops.gate_back_in_place(gradient, x)
        return x if further is None else x + further

    def backward_scale(self, gradient: torch.Tensor, x: torch.Tensor, scale: None, kept: None) -> None:
        return None


class After(Protocol):
    """From a product to what a projection gives. `turn` are tensors that take part."""

    def forward(self, y: torch.Tensor, *turn: torch.Tensor) -> tuple[Kept, Kept]:
        """(results, what is kept). The product may be changed in place: nobody else has it."""
        ...

    def backward(self, gradients: tuple[Any, ...], kept: Kept) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """(gradient of the product, gradients of `turn`)."""
        ...


class Whole:
    """The product as it is."""

    def forward(self, y: torch.Tensor, *turn: torch.Tensor) -> tuple[Kept, Kept]:
        return (y,), ()

    def backward(self, gradients: tuple[Any, ...], kept: Kept) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        return gradients[0], ()


class Heads:
    """Queries, keys and values in heads, [1, heads, N, D] as transformers' attention takes them, turned by their positions.

    All three are views of the product, so that attention keeps that and no more; with a norm over the heads (Qwen3) queries and
    keys are new, because the norm's way back needs the old ones. `turn` is cos and sin [1, N, R], each in R / 2 values and once
    more, and the norm's scale [query and key heads, D] where there is one.
    """

    def __init__(self, queries: int, keys: int, size: int, *, paired: bool, epsilon: float | None, ops: Elementwise) -> None:
        self._queries, self._keys, self._size = queries, keys, size
        self._paired, self._epsilon, self._ops = paired, epsilon, ops

    def forward(self, y: torch.Tensor, *turn: torch.Tensor) -> tuple[Kept, Kept]:
        half = turn[0].shape[-1] // 2
        cos, sin = turn[0][0, :, :half], turn[1][0, :, :half]
        heads = y.unflatten(1, (-1, self._size))
        straight, values = heads.split([self._queries + self._keys, self._keys], 1)
        turned: torch.Tensor = straight
        kept: Kept = (cos, sin)
        if self._epsilon is not None:
            turned, inverse = self._ops.normed(straight, turn[2], self._epsilon, y.dtype)
            kept = (cos, sin, straight, inverse, turn[2])
        self._ops.turn_in_place(turned, cos, sin, self._paired)
        parts = (*turned.split([self._queries, self._keys], 1), values)
        return tuple(part.transpose(0, 1)[None] for part in parts), kept

    def backward(self, gradients: tuple[Any, ...], kept: Kept) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        cos, sin, *normed = kept
        parts = [gradient[0].transpose(0, 1) for gradient in gradients]
        found = self._ops.turned_back(*parts, cos, sin, self._paired)
        if not normed:
            return found, (None, None)
        straight, inverse, scale = normed
        heads = found.unflatten(1, (-1, self._size))
        gradient = heads[:, : self._queries + self._keys]
        of_scale = self._ops.normed_back_scale(gradient, straight, inverse).to(scale.dtype)
        gradient.copy_(self._ops.normed_back(gradient, straight, scale, inverse, None))
        return found, (None, None, of_scale)
