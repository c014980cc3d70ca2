"""What fused layers take (core/train/fused): the sizes that tokens are rounded up to, what stands through a run, what a layer
keeps, and the bytes at the widest moments of its way back.

A flash attention's way back, as torch has it, sums the queries' gradient in fp32, gives each row up to 128 tokens more room for
that, and spreads keys' and values' gradients over all heads where these share them. N is tokens, I a gate's width.
tests/core/plan holds all this against the engine's own bounds, what autograd saves, and what a step takes on a CPU.
"""

import math

from core.plan.shape import READERS
from core.plan.work import Work, fineness
from core.spec import LoraTuning

ATTENDED_AGAIN = 1024
"""Up to rows this long a layer makes attention's result again (core.train.fused.layer)."""
CHUNK = 3072
"""Tokens at once in the MLP of a layer that is made again (core.train.fused.halves)."""
LOGITS_AT_ONCE = 1 << 25
"""Of a head that makes its gradient in the same pass (core.train.fused.head)."""
_ROOM = 1.25
"""Of what all recorded sizes share, over the first that needed it (core.train.fused.graphs)."""
_FLASH_ROWS = 128


def is_attended_again(work: Work) -> bool:
    longest = work.longest
    if work.is_recorded:  # rounded up, and the row of padding may be the longest
        longest = 1 << (max(longest, fineness(work.held_tokens)) - 1).bit_length()
    return longest <= ATTENDED_AGAIN


def kept_by_layer(work: Work) -> float:
    """Of a token, but for attention's queries, keys, values and result."""
    shape, size, tuning = work.shape, work.compute_bytes, work.spec.tuning
    width = 2 * shape.intermediate
    numbers = 2.0  # fp32, one a norm
    if shape.head_norms:
        width, numbers = width + shape.queries + shape.keys, numbers + shape.heads + shape.keys // shape.head_size
    if shape.norms == 4:
        width, numbers = width + 2 * shape.hidden, numbers + 2
    if isinstance(tuning, LoraTuning):
        width += tuning.rank * len(work.adapted)
    return size * width + 2 * work.stream_bytes + 4 * numbers


def standing(work: Work) -> float:
    """Through the whole run: adapters as layers multiply with them, and what all graphs share."""
    found = float(work.compute_bytes * _stacked(work))
    if work.is_recorded:
        # The decoder's result and its gradient. Steps of like rows lie close together, so room is made once for all of them,
        # beyond the first, which is an average one.
        room = max(work.held_tokens, _ROOM * min(work.held_tokens, work.computed_tokens / work.micro_batches))
        found += 2 * room * work.shape.hidden * work.compute_bytes
    return found


def passing(work: Work, rounding: float, scratch: float) -> float:
    """Bytes beside what is kept, at the wider of two moments in the last layer's way back: in its MLP, and in attention, when
    gate and up are gone. `rounding` is bytes for each number that fp8 rounds, `scratch` those of a matrix that is unpacked."""
    shape, size, stream, tokens = work.shape, work.compute_bytes, work.stream_bytes, work.held_tokens
    cast = size * shape.hidden if work.is_full else 0  # the stream's gradient for products
    # Gate and up are written over: beside them there is the gradient of their product, then that of their input, the stream's
    # new one, and the norm's result.
    gate = max((size + rounding) * shape.intermediate, 2 * size * shape.hidden + stream)
    mlp = tokens * (stream + cast + gate) + scratch
    let_go = 2 * size * shape.intermediate + stream + (size * shape.hidden if shape.norms == 4 else 0)
    again = size * shape.queries + 4 * shape.heads if is_attended_again(work) else 0
    weights = 4.0 * _mlp_weights(work) if work.is_full else 0.0  # whose gradients wait for the layer's end
    attention = _attention_back(work) + tokens * (2 * stream + cast + again - let_go) + weights
    return max(mlp, attention)


def made_again(work: Work, rounding: float) -> float:
    """Bytes while a layer is made again and gone back through, at the wider of two moments: in its MLP, which goes chunk by
    chunk between two matrices that lie ready, or in attention's way back."""
    shape, size, stream, tokens = work.shape, work.compute_bytes, work.stream_bytes, work.held_tokens
    is_offloaded = work.spec.memory.checkpointing_offload
    heads = size * (shape.queries + 2 * shape.keys)
    if shape.head_norms:  # as they were before their norm, too
        heads += size * (shape.queries + shape.keys) + 4 * (shape.heads + shape.keys // shape.head_size)
    if shape.norms == 4:  # what is added, before its norm
        heads += size * shape.hidden
    result = size * shape.queries + 4 * shape.heads
    # The sum behind attention and two gradients of the stream. With a host it is the way forward that holds most: what comes in,
    # the sum, what goes out, a chunk of that, and what is leaving.
    waiting = 5 * stream if is_offloaded else 3 * stream + heads + result
    # A chunk's gate and up and the gradient of their product; the norm's result, its gradient and the stream's.
    wide = max((3 * size + rounding) * shape.intermediate, 2 * size * shape.intermediate + 2 * size * shape.hidden + stream)
    mlp = tokens * waiting + _chunk(work) * wide + _at_hand(work)
    weights = 4.0 * _mlp_weights(work) if work.is_full else 0.0
    # Two gradients of the stream; with a host the layer's input and, on its way, what the layer below needs.
    streams = (4 if is_offloaded else 2) * stream + (size * shape.hidden if work.is_full else 0)
    attention = _attention_back(work) + tokens * (streams + heads + result) + weights
    return max(mlp, attention)


def _attention_back(work: Work) -> float:
    """Gradients of attention's result, queries, keys and values, and what they are made with."""
    shape, size = work.shape, work.compute_bytes
    summed = 4.0 * (shape.queries + shape.heads) * (work.held_tokens + _FLASH_ROWS * work.held_sequences)
    spread = 2 * size * shape.queries if shape.keys < shape.queries else 0
    return summed + work.held_tokens * (spread + size * (2 * shape.queries + 2 * shape.keys))


def _chunk(work: Work) -> int:
    """Tokens of the largest chunk; all of them where weights train."""
    count = 1 if work.is_full else max(1, math.ceil(work.held_tokens / CHUNK))
    return math.ceil(work.held_tokens / count)


def _at_hand(work: Work) -> float:
    """Bytes of the MLP's matrices in the dtype they are multiplied in, where they are kept otherwise: in 8 bits turned over."""
    if work.is_fp8:
        return float(_mlp_weights(work))
    is_kept_so = work.packed_bytes is None and not work.is_full
    return 0.0 if is_kept_so else float(work.compute_bytes * _mlp_weights(work))


def _mlp_weights(work: Work) -> int:
    return 3 * work.shape.hidden * work.shape.intermediate


def _stacked(work: Work) -> int:
    """Numbers of all adapters as they are multiplied with: of modules that read one input A one below the other, and B on a
    diagonal."""
    tuning = work.spec.tuning
    if not isinstance(tuning, LoraTuning):
        return 0
    adapted = set(work.adapted)
    groups = [names & work.shape.linear.keys() for names in READERS.values()]
    below = sum(work.shape.linear[name][0] * tuning.rank for name in adapted)
    above = sum(sum(work.shape.linear[name][1] for name in group) * tuning.rank * len(group & adapted) for group in groups)
    return work.shape.layers * (below + above)
