"""Linear layers of a step on a CPU, fp32: by oneDNN, where torch would ask MKL.

MKL multiplies the few rows of a step slowly on processors that are not Intel's; oneDNN reads the same weights in place and
gives the same numbers to fp32's rounding. `python -m benchmarks.serve --cases cpu-135m/8-clients` is where it shows.
Other dtypes go to oneDNN by themselves; the reference (`generate.py`) computes as torch does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


class OneDnnLinears:
    """The plain linear modules of a model that oneDNN can take; none on a GPU, or where torch is built without it."""

    def __init__(self, model: Any) -> None:
        self._modules = [
            module
            for module in model.modules()
            # Not of a subclass: a quantised module's weight is no matrix.
            if type(module) is torch.nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
        ]
        if not torch.backends.mkldnn.is_available():
            self._modules = []

    @contextmanager
    def multiplying(self) -> Iterator[None]:
        """Within the block oneDNN multiplies, hooks run as ever, and there is no gradient."""
        for module in self._modules:
            module.forward = partial(_multiply, module)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward


def _multiply(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    # The operator behind torch.compile's linear layers; its last three arguments are what could follow in the same pass.
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
