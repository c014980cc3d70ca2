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

    def backward(self, gradient: torch.Tensor, x: Any, scale: Any, kept: Any, further: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient of x, as `again`); `further`, if any, is another gradient that is added. Both may be written over."""
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

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, scale: None, kept: None, further: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (gradient if further is None else gradient + further), x.to(gradient.dtype)

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self._ops.normed_back_and_again(gradient, x, scale, kept, further)
        return found

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

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, scale: None, kept: None, further: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._ops.gate_back_in_place(gradient, x)
        return (x if further is None else x + further), gradient

    def backward_scale(self, gradient: torch.Tensor, x: torch.Tensor, scale: None, kept: None) -> None:
        return None


class After(Protocol):
    """From a product to what goes on from it. `turn` is what it takes beside the product."""

    def forward(self, y: torch.Tensor, *turn: torch.Tensor) -> tuple[Kept, Kept]:
        """(results, what is kept beside them). y may be written over."""
        ...

    def backward(self, gradients: Kept, kept: Kept, *turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(gradient of y, gradient of the parameter in `turn` if there is one)."""
        ...


class Whole:
    """The product itself."""

    def forward(self, y: torch.Tensor, *turn: torch.Tensor) -> tuple[Kept, Kept]:
        return (y,), ()

    def backward(self, gradients: Kept, kept: Kept, *turn: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class Heads:
    """Queries, keys and values [1, heads, N, D], positions turned in, normed head by head first where there is an epsilon.

    Takes cos and sin [1, N, R], as transformers' rotary embeddings give them, and the norms' scale, a row for each head.
    """

    def __init__(self, queries: int, keys: int, size: int, *, paired: bool, epsilon: float | None, ops: Elementwise) -> None:
        self._queries, self._keys, self._size = queries, keys, size
        self._paired, self._epsilon, self._ops = paired, epsilon, ops

    def forward(self, y: torch.Tensor, *turn: torch.Tensor) -> tuple[Kept, Kept]:
        heads = y.unflatten(1, (-1, self._size))
        straight, values = heads.split([self._queries + self._keys, self._keys], 1)
        turned: torch.Tensor = straight
        kept: Kept = ()
        if self._epsilon is not None:
            turned, inverse = self._ops.normed(straight, turn[2], self._epsilon, y.dtype)
            kept = (straight, inverse)
        self._ops.turn_in_place(turned, *_half(turn), self._paired)
        parts = (*turned.split([self._queries, self._keys], 1), values)
        return tuple(part.transpose(0, 1)[None] for part in parts), kept

    def backward(self, gradients: Kept, kept: Kept, *turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = [gradient[0].transpose(0, 1) for gradient in gradients]
        found: torch.Tensor = self._ops.turned_back(*parts, *_half(turn), self._paired)
        if not kept:
            return found, None
        straight, inverse = kept
        heads = found.unflatten(1, (-1, self._size))
        gradient = heads[:, : self._queries + self._keys]
        of_scale = self._ops.normed_back_scale(gradient, straight, inverse).to(turn[2].dtype)
        gradient.copy_(self._ops.normed_back(gradient, straight, turn[2], inverse, None))
        return found, of_scale


def _half(turn: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [N, R / 2]: transformers' tables hold each twice."""
    half = turn[0].shape[-1] // 2
    return turn[0][0, :, :half], turn[1][0, :, :half]
