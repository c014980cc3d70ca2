"""The few numbers of the plan that reading the engine can't give.

Everything else in this package is counted: what autograd keeps of a layer, how many products a step has. These are fitted to
runs on a GPU by `python -m benchmarks.plan --fit FILE`, over the fitting runs alone (benchmarks.plan.FITTING); the judged runs
are predicted with what stands here and change nothing.

Not fitted yet: memory is what counting gives (kept_* of 1), time is estimated from single runs of a prototype on one H100
(1.1B and 7B, LoRA of rank 16 and full, packed, 8k and 16k tokens at once).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Coefficients:
    fixed_gib: float = 0.15
    """Work space of the libraries (cuBLAS has 32 MiB a thread) and what no part below names."""
    kept_plain: float = 1.0
    kept_packed: float = 1.0
    kept_fused: float = 1.0
    """What a tier keeps for the backward pass, over what was counted."""
    passing: float = 1.0
    """What a layer's backward pass takes beside that, over what was counted."""

    matmul_share: float = 0.66
    """Of the datasheet's dense 16-bit FLOP/s, in large matrix products."""
    fp8_speed: float = 1.5
    """Rate of a layer's 8-bit products over that of its 16-bit ones, the rounding of what is multiplied included."""
    bandwidth_share: float = 0.80
    """Of the datasheet's bytes/s."""
    traffic_plain: float = 20.0
    traffic_packed: float = 8.5
    traffic_fused: float = 5.0
    """Times that a byte kept for the backward pass is moved, by all that is no matrix product of the base."""
    traffic_adapter: float = 5.0
    """Times that what an adapted module reads and gives is moved, by its adapter."""
    layer_seconds: float = 1.2e-3
    adapter_seconds: float = 0.25e-3
    """The host's part of a layer in one micro-batch, forward and backward, and of each adapted module in it: a GPU can't be
    faster than it is told what to do."""
    fused_share: float = 0.35
    """Of those, with fused layers that the host takes part in; others are recorded and cost it nothing."""
    step_seconds: float = 0.02
    """Of a step whatever its size: data, clipping, the event."""


STANDING = Coefficients()


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU by its datasheet: dense bf16 FLOP/s with fp32 sums, and bytes/s of its memory."""

    flops: float
    bandwidth: float


GPUS: dict[str, Gpu] = {
    "H200": Gpu(989e12, 4.8e12),
    "H100 PCIe": Gpu(756e12, 2.0e12),
    "H100": Gpu(989e12, 3.35e12),
    "A100": Gpu(312e12, 2.0e12),
    "L40S": Gpu(362e12, 0.864e12),
    "L4": Gpu(121e12, 0.3e12),
    "A10": Gpu(125e12, 0.6e12),
    "RTX 4090": Gpu(165e12, 1.0e12),
    "RTX 3090": Gpu(71e12, 0.936e12),
}
"""Part of the name that nvidia-smi gives -> its figures; the first that matches counts. The shares above were seen on an H100."""


def find_gpu(name: str | None) -> Gpu | None:
    """The kind that a device's name tells of; None for a CPU and a GPU that is not listed."""
    return next((gpu for part, gpu in GPUS.items() if name is not None and part in name), None)
