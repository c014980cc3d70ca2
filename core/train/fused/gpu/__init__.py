"""The element-wise functions of `elementwise.py` as kernels of NVIDIA GPUs, in Triton: one pass over the tensors each.

Compiled once for a machine and a shape's divisibility, not for a run: there is nothing to trace, nothing to look up in every
call, and nothing that a graph could not record.
"""

from core.train.fused.elementwise import Elementwise
from core.train.fused.gpu.eight_bits import rows_in_8_bits, scaled_in_8_bits, turned_over
from core.train.fused.gpu.gates import gate_back_in_place, gated
from core.train.fused.gpu.nats import nats_in_place
from core.train.fused.gpu.norms import normed, normed_again, normed_back, normed_back_and_again, normed_back_scale
from core.train.fused.gpu.turns import turn_in_place, turned_back

ON_GPU = Elementwise(
    normed=normed,
    normed_again=normed_again,
    normed_back=normed_back,
    normed_back_and_again=normed_back_and_again,
    normed_back_scale=normed_back_scale,
    gated=gated,
    gate_back_in_place=gate_back_in_place,
    turn_in_place=turn_in_place,
    turned_back=turned_back,
    nats_in_place=nats_in_place,
    rows_in_8_bits=rows_in_8_bits,
    scaled_in_8_bits=scaled_in_8_bits,
    turned_over=turned_over,
)
