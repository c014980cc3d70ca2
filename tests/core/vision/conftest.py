"""Random unit features, and the bytes that a piece of torch code holds at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside the context: `peak` at once, `largest` of one."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                reference, size = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
                if reference not in given:
                    self.alive[reference] = size
                    self.largest = max(self.largest, size)
        self.alive = {reference: size for reference, size in self.alive.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.fixture
def unit() -> Callable[..., torch.Tensor]:
    """unit(rows, width, seed) -> fp32 rows of length 1, a leaf with a gradient."""

    def make(rows: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        return normalize(drawn, dim=-1).to(dtype).requires_grad_()

    return make
