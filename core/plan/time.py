"""Seconds of an optimizer step, from what it computes and moves on a kind of GPU.

A step is as slow as the slower of two: the GPU, which multiplies at a share of its datasheet's rate and beside that moves bytes
(norms, gates, adapters: a number of times what a layer keeps; quantised weights once a pass; weights and states of the
optimizer), and the host, which has to launch every kernel of every micro-batch, but for those that are recorded as graphs.
"""

from core.plan.coefficients import STANDING, Coefficients, Gpu
from core.plan.memory import LOGITS_AT_ONCE, kept_per_token
from core.plan.work import Work

_OPTIMIZER_MOVES = 36
"""Bytes moved per trained parameter: gradient cleared and added to, its norm, and AdamW over weight, gradient and two states."""


def step_seconds(work: Work, gpu: Gpu, coefficients: Coefficients = STANDING) -> float:
    """Of a step of average rows, as the engine's own clock counts them: from its rows to its weights."""
    flops = step_flops(work)
    if work.is_fp8:
        flops -= _layer_flops(work) * (1 - 1 / coefficients.fp8_speed)
    multiplying = flops / (coefficients.matmul_share * gpu.flops)
    moving = _moved_bytes(work, coefficients) / (coefficients.bandwidth_share * gpu.bandwidth)
    return max(multiplying + moving, _host_seconds(work, coefficients)) + coefficients.step_seconds


def step_flops(work: Work) -> float:
    """Of a step's matrix products, padding and recomputation included.

    A token through a matrix of P numbers takes 2 P forward, 2 P back to its input and, where the matrix trains, 2 P more.
    Causal attention over L tokens is half a square: 2 L times the width of the queries forward, twice that back.
    """
    shape, again = work.shape, _again(work)
    matrix = 2 + (4 if work.is_full else 2)
    adapters = 0.0 if work.is_full else 6.0 * work.computed_tokens * work.trainable
    attention = work.computed_tokens * work.attended * shape.queries * shape.layers * (6 + 2 * again)
    in_chunks = work.held_trained * shape.vocabulary > LOGITS_AT_ONCE  # chunks are made again in the backward pass
    head = work.trained_tokens * shape.head_weights * (matrix + (2 if in_chunks else 0))
    return _layer_flops(work) + adapters + attention + head


def _layer_flops(work: Work) -> float:
    """Of those, the layers' own matrices."""
    shape = work.shape
    matrix = 2 + (4 if work.is_full else 2)
    return work.computed_tokens * shape.layers * shape.layer_weights * (matrix + 2 * _again(work))


def _moved_bytes(work: Work, coefficients: Coefficients) -> float:
    shape, size, again = work.shape, work.compute_bytes, _again(work)
    times = {"plain": coefficients.traffic_plain, "packed": coefficients.traffic_packed, "fused": coefficients.traffic_fused}
    ends = sum(sum(shape.linear[name]) for name in work.adapted) * size
    a_token = shape.layers * (times[work.tier] * kept_per_token(work, work.tier) + coefficients.traffic_adapter * ends)
    moved = work.computed_tokens * a_token * (1 + again / 3)
    weights = shape.layers * shape.layer_weights
    packed = work.packed_bytes
    if work.is_fp8:
        moved += work.micro_batches * weights * 2  # turned over on the way back: read and written
    elif packed is not None:
        moved += work.micro_batches * (2 + again) * weights * (packed + size)
    if work.is_full:
        moved += work.micro_batches * weights * (4 + size)  # autocast's copies
    return moved + _OPTIMIZER_MOVES * work.trainable


def _host_seconds(work: Work, coefficients: Coefficients) -> float:
    if work.is_recorded:
        return 0.0
    layer = coefficients.layer_seconds + coefficients.adapter_seconds * len(work.adapted)
    if work.tier == "fused":
        layer *= coefficients.fused_share
    return work.micro_batches * work.shape.layers * layer * (1 + _again(work) / 3)


def _again(work: Work) -> float:
    """Share of the layers whose forward pass is made twice."""
    return work.recomputed_layers / work.shape.layers
