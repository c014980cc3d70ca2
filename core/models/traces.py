"""What each module of an adapter adds while a model runs: the adapter, seen from inside.

A forward pass with hooks tells of every module how much it adds to its output. That places a fault (two modules exchanged, a
scale that is not the trained one) where logits only show that there is one. Read by the parity record, on both sides.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer

from core.models.embeddings import trained_modules

_SAMPLES = 4


@dataclass(frozen=True)
class Touched:
    """One module of the plain model that an adapter changes: `layer` is peft's, which stands in its place."""

    path: str
    kind: Literal["lora", "dora", "whole"]
    layer: Any
    adapter: str

    def is_inert(self) -> bool:
        """Whether its weights are such that it adds nothing, to whatever input.

        Exact, and so silent on sums that cancel; a DoRA magnitude counts as adding something, since only the norms of the
        base's weight could tell.
        """
        if self.kind == "whole":
            mine, original = self.layer.modules_to_save[self.adapter].state_dict(), self.layer.original_module.state_dict()
            return all(torch.equal(mine[name], original[name].to(mine[name].dtype)) for name in mine)
        if self.kind == "dora":
            return False
        if self.layer.scaling[self.adapter] == 0:
            return True
        reads = self.layer.lora_A[self.adapter].weight.any(dim=1)
        writes = self.layer.lora_B[self.adapter].weight.any(dim=0)
        return not bool((reads & writes).any())


def touched_modules(model: Any, adapter: str) -> list[Touched]:
    """What an adapter of a plain model, or of a PeftModel, stands on, by paths of the plain one and in its order."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    touched = [
        Touched(path, "dora" if layer.use_dora.get(adapter) else "lora", layer, adapter)
        for path, layer in plain.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    ]
    whole = [Touched(path, "whole", layer, adapter) for path, layer in trained_modules(plain).items()]
    return touched + [module for module in whole if adapter in module.layer.modules_to_save]


class Trace:
    """What passed through one module: see `core.adapter.ModuleTrace`, whose numbers these are."""

    def __init__(self) -> None:
        # Sums stay on the device until they are asked for: a pass waits for nothing.
        self._added: list[torch.Tensor] = []
        self._output: list[torch.Tensor] = []
        self._sample: torch.Tensor | None = None
        self._entries = 0

    def take(self, added: torch.Tensor, output: torch.Tensor) -> None:
        """Count one pass through the module; both [..., outputs], `added` in fp32."""
        self._entries += added.numel()
        self._added.append(added.square().sum())
        self._output.append(output.float().square().sum())
        rows = added.reshape(-1, added.shape[-1])
        if len(rows):  # an expert may be called with no token
            columns = torch.linspace(0, rows.shape[-1] - 1, _SAMPLES, device=rows.device).round().long()
            self._sample = rows[-1, columns]

    @property
    def rms(self) -> float:
        return self._mean(self._added)

    @property
    def output_rms(self) -> float:
        return self._mean(self._output)

    @property
    def sample(self) -> list[float]:
        return [] if self._sample is None else [float(value) for value in self._sample.tolist()]

    def _mean(self, sums: list[torch.Tensor]) -> float:
        return float(torch.stack(sums).sum().div(max(1, self._entries)).sqrt())


@contextmanager
def tracing(modules: Sequence[Touched]) -> Iterator[dict[str, Trace]]:
    """Fill a trace per module that is reached, by path and in the order they are, while the block runs the model.

    The adapter must be active. What peft computes is read as it is, not computed again, but for whole modules, whose original
    is run beside them.
    """
    traces: dict[str, Trace] = {}
    handles = []

    def whole(module: Touched) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            original = module.layer.original_module(*inputs)
            traces.setdefault(module.path, Trace()).take(output.float() - original.float(), original)

        return hook

    def lora(module: Touched) -> tuple[Callable[..., None], Callable[..., None]]:
        kept: list[torch.Tensor] = []
        scale = 1.0 if module.kind == "dora" else module.layer.scaling[module.adapter]

        def keep(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            kept[:] = [output]

        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            traces.setdefault(module.path, Trace()).take(output.float() * scale, kept.pop())

        return keep, hook

    for module in modules:
        if module.kind == "whole":
            handles.append(module.layer.modules_to_save[module.adapter].register_forward_hook(whole(module)))
        else:
            keep, hook = lora(module)
            branch = module.layer.lora_magnitude_vector if module.kind == "dora" else module.layer.lora_B
            handles.append(module.layer.get_base_layer().register_forward_hook(keep))
            handles.append(branch[module.adapter].register_forward_hook(hook))
    try:
        yield traces
    finally:
        for handle in handles:
            handle.remove()
