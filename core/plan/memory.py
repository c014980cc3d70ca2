"""GiB at the peak of a run, counted from what the engine keeps: weights, states, and for every token what autograd saves.

How it was counted, for a layer of hidden size H, queries Q, keys K, gate I, in bytes of the compute precision (2 in bf16):
transformers' norm keeps an fp32 copy of its input, liger's its input; attention keeps queries, keys, values, its result and an
fp32 number for each head; the gate keeps gate, up and, unless it is liger's, the activation; LoRA keeps what each group of
modules reads once, and its own r numbers. In full tuning the stream is fp32, a norm keeps its result too, and autocast hands
every module a copy of its own. Fused layers are counted in fused.py.
tests/core/plan/test_kept.py and test_peak.py hold all this against what autograd saves, and a step takes, on a CPU.
"""

from core.catalog import Tier
from core.plan import fused
from core.plan.coefficients import STANDING, Coefficients
from core.plan.shape import READERS, targets_of
from core.plan.work import Work
from core.records import MemoryEstimate
from core.spec import FullTuning, LoraTuning, MoraTuning
from core.tuning import adapter_parameters, mora_size

GIB = 1 << 30
LOGITS_AT_ONCE = 1 << 26
"""The head is applied in chunks of so many logits (core.eval.nats)."""
_LOGIT_BYTES = 12
"""In the backward pass of the cross-entropy: its fp32 log-softmax, and two fp32 gradients."""

_OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256}
"""Two states per trained parameter: fp32, or one byte each and an fp32 scale per block of 256 (arXiv 2110.02861)."""


def estimate_memory(work: Work, coefficients: Coefficients = STANDING) -> MemoryEstimate:
    """The parts at the moment when their sum is largest: in a step, or while a packed run is compared with the plain tier."""
    step = _fused_step(work, coefficients) if work.tier == "fused" else _step(work, coefficients)
    if not work.probed_tokens:
        return step
    probe = _probe(work, coefficients)
    return max(step, probe, key=lambda estimate: estimate.total_gib)


def kept_per_token(work: Work, tier: Tier) -> float:
    """Bytes that a layer which isn't checkpointed keeps of a token for its backward pass."""
    shape, size = work.shape, work.compute_bytes
    attention = size * 2 * (shape.queries + shape.keys) + 4 * shape.heads
    if "qkv_proj" in shape.linear:  # values are a view of all three as they were before their turn
        attention += size * (shape.queries + shape.keys)
    if tier == "fused":
        again = size * shape.queries + 4 * shape.heads if fused.is_attended_again(work) else 0
        return attention - again + fused.kept_by_layer(work)
    if shape.keeps_scores:  # capped, in the softmax's fp32, and what is multiplied with the values
        attention += shape.heads * work.longest * (2 * size + 4)
    elif tier == "plain" and size == 4:
        # In fp32 and with a mask no fused kernel was at work on an H100, as its peak tells (13.86 GiB, llama-1.1b/fp32 of
        # benchmarks/memory.py): torch's plain product keeps the softmax, and keys and values spread over the queries' heads.
        attention += 4 * (shape.heads * (work.longest - 1) + 2 * (shape.queries - shape.keys))
    kernels = tier == "packed" and work.has_kernels
    return attention + _kept_by_norms(work, kernels) + _kept_by_gate(work, kernels) + _kept_by_readers(work)


def weight_bytes(work: Work) -> float:
    """Resident weights, adapter included; without autocast's copies."""
    shape, size, tuning = work.shape, work.compute_bytes, work.spec.tuning
    if isinstance(tuning, FullTuning):
        return 4.0 * work.parameters  # weights that train are fp32
    linear = shape.layers * shape.layer_weights
    packed = work.packed_bytes
    # Embeddings, norms and head are not quantised.
    weights = (size if packed is None else packed) * linear + size * (work.parameters - linear) + 4.0 * work.trainable
    if isinstance(tuning, LoraTuning) and tuning.init != "default":
        weights += 4.0 * adapter_parameters(tuning, targets_of(shape, tuning))  # where it began, kept beside it
    return weights


def _step(work: Work, coefficients: Coefficients) -> MemoryEstimate:
    factor = coefficients.kept_plain if work.tier == "plain" else coefficients.kept_packed
    layer = factor * kept_per_token(work, work.tier)
    recomputed = work.recomputed_layers
    kept = work.held_tokens * (layer * (work.shape.layers - recomputed) + _ends(work)) + _streams_kept(work)
    # One layer's way back, together with that layer made again where it is; the logits are gone by then.
    passing = coefficients.passing * work.held_tokens * _passing(work) + _scratch(work)
    if recomputed:
        passing += work.held_tokens * layer
    logits = min(work.held_trained * work.shape.vocabulary, LOGITS_AT_ONCE) * _LOGIT_BYTES
    gradients = 4.0 * work.trainable
    if work.most_micro_batches == 1:  # they grow as what is kept goes
        gradients = max(0.0, gradients - kept)
    return _estimate(
        weights=weight_bytes(work) + _copies(work, work.tier),
        gradients=gradients,
        optimizer=_states(work),
        activations=kept,
        logits=logits,
        workspace=max(0.0, passing - logits) + coefficients.fixed_gib * GIB,
    )


def _fused_step(work: Work, coefficients: Coefficients) -> MemoryEstimate:
    shape, tokens = work.shape, work.held_tokens
    recomputed = work.recomputed_layers
    layer = coefficients.kept_fused * kept_per_token(work, "fused")
    kept = tokens * (layer * (shape.layers - recomputed) + _tables(work)) + _streams_kept(work)
    moments = [fused.made_again(work, _rounding(work))] if recomputed else []
    moments += [fused.passing(work, _rounding(work), _scratch(work))] if recomputed < shape.layers else []
    back = coefficients.passing * max(moments)
    # What the head reads, and its gradient, of the tokens that carry loss.
    read = 2.0 * work.held_trained * shape.hidden * work.compute_bytes
    if _has_fused_head(work):
        logits = min(work.held_trained * shape.vocabulary, fused.LOGITS_AT_ONCE) * float(work.compute_bytes)
    else:
        logits = min(work.held_trained * shape.vocabulary, LOGITS_AT_ONCE) * float(_LOGIT_BYTES)
    # The head computes beside the graphs' memory, which is theirs alone.
    apart = max(0.0, back - logits, read + 2.0 * tokens * work.stream_bytes)
    workspace = back + read if work.is_recorded else apart
    return _estimate(
        weights=weight_bytes(work) + (_copies(work, "fused") if work.is_full else 0.0) + fused.standing(work),
        gradients=4.0 * work.trainable,  # which lie there from the beginning
        optimizer=_states(work),
        activations=kept,
        logits=logits,
        workspace=workspace + coefficients.fixed_gib * GIB,
    )


def _probe(work: Work, coefficients: Coefficients) -> MemoryEstimate:
    """The plain tier on a few rows. What is compared waits in the host's memory; no optimizer state stands yet."""
    layer = coefficients.kept_plain * kept_per_token(work, "plain")
    recomputed = work.recomputed_layers
    kept = work.probed_tokens * (layer * (work.shape.layers - recomputed) + work.stream_bytes * recomputed + _ends(work))
    passing = coefficients.passing * work.probed_tokens * _passing(work) + max(_scratch(work), _scratch_of_probe(work))
    passing += work.probed_tokens * layer if recomputed else 0.0
    trained = work.held_trained / work.held_tokens
    logits = min(work.probed_tokens * trained * work.shape.vocabulary, LOGITS_AT_ONCE) * _LOGIT_BYTES
    gradients = 4.0 * work.trainable
    return _estimate(
        weights=weight_bytes(work) + _copies(work, "plain"),
        gradients=max(0.0, gradients - kept),
        optimizer=0.0,
        activations=kept,
        logits=logits,
        workspace=max(0.0, passing - logits) + coefficients.fixed_gib * GIB,
    )


def _kept_by_norms(work: Work, kernels: bool) -> float:
    shape, size = work.shape, work.compute_bytes
    stream, count = shape.norms * shape.hidden, shape.norms
    heads = 0
    if shape.head_norms:
        heads, count = shape.queries + shape.keys, count + shape.heads + shape.keys // shape.head_size
    inputs = shape.norms * work.stream_bytes + size * heads
    if kernels:
        return inputs + 4 * count
    results = inputs if work.is_full else 0  # for the gradient of its scale
    return 4 * (stream + heads) + results + 4 * count


def _kept_by_gate(work: Work, kernels: bool) -> float:
    shape, size = work.shape, work.compute_bytes
    if not shape.gated:
        return size * shape.intermediate
    return size * shape.intermediate * (2 if kernels else 3)


def _kept_by_readers(work: Work) -> float:
    """Inputs of matrix products that train something. Attention's result is kept by attention."""
    shape, size, tuning = work.shape, work.compute_bytes, work.spec.tuning
    if not isinstance(tuning, LoraTuning | MoraTuning):
        if size == 4:
            return size * (2 * shape.hidden + shape.intermediate)
        # The stream is fp32: autocast makes a copy for every module that reads it.
        readers = sum(name in READERS["attention"] | READERS["gate"] for name in shape.linear)
        return size * (readers * shape.hidden + shape.intermediate)
    adapted = {name: shape.linear[name] for name in work.adapted}
    if isinstance(tuning, MoraTuning):
        return size * sum(mora_size(inputs, outputs, tuning.rank) for inputs, outputs in adapted.values())
    kept = size * tuning.rank * len(adapted)
    if tuning.dora:
        kept += 2 * size * sum(outputs for _, outputs in adapted.values())
    if tuning.dropout:  # each module has a mask of its own, and what is left of its input
        return kept + (size + 1) * sum(inputs for inputs, _ in adapted.values())
    for group, width in (("attention", shape.hidden), ("gate", shape.hidden), ("down", shape.intermediate)):
        if READERS[group] & adapted.keys():
            kept += size * width
    known = set().union(*READERS.values())
    return kept + size * sum(inputs for name, (inputs, _) in adapted.items() if name not in known)


def _streams_kept(work: Work) -> float:
    """What checkpointed layers keep on the device."""
    if work.spec.memory.checkpointing_offload:
        return 0.0
    return float(work.held_tokens * work.stream_bytes * work.recomputed_layers)


def _ends(work: Work) -> float:
    """Bytes a token takes whatever the number of layers: the last stream and its gradient, and `_tables`."""
    return 3 * work.stream_bytes + _tables(work)


def _tables(work: Work) -> float:
    """Ids, positions, rotary tables."""
    return 2 * work.shape.head_size * (4 if work.is_full else work.compute_bytes) + 24


def _states(work: Work) -> float:
    # Paged states of whole matrices leave when others need the room, and are not the allocator's.
    is_paged = work.is_full and work.spec.optim.kind.startswith("paged_")
    return 0.0 if is_paged else _OPTIMIZER_BYTES[work.spec.optim.kind] * work.trainable


def _passing(work: Work) -> float:
    """Bytes of a token while a layer's backward pass goes through its gate, the widest place: two gradients of that width."""
    return (2.0 * work.compute_bytes + _rounding(work)) * work.shape.intermediate


def _rounding(work: Work) -> float:
    """Bytes for each number of the widest thing that fp8 rounds: its codes, gate's and up's at once with fused layers, and two
    fp32 copies as well where nothing is compiled."""
    if not work.is_fp8:
        return 0.0
    return 2.0 if work.tier == "fused" else 9.0


def _has_fused_head(work: Work) -> bool:
    tuning = work.spec.tuning
    return not work.is_full and not work.spec.data.new_tokens and not (isinstance(tuning, LoraTuning) and tuning.train_embeddings)


def _scratch(work: Work) -> float:
    """Bytes for one matrix at a time: dequantised to be multiplied with, or its gradient before it is fp32 and added; of fp8 the
    codes turned over."""
    joined = 2 if work.tier == "fused" and "gate_proj" in work.shape.linear else 1  # gate and up are one matrix there
    if work.is_full:
        return (work.compute_bytes + 4) * max(joined * work.shape.largest, work.shape.head_weights)
    if work.packed_bytes is None:
        return 0.0
    return float(joined * (1 if work.is_fp8 else work.compute_bytes) * work.shape.largest)


def _scratch_of_probe(work: Work) -> float:
    """Tiers are compared with fp8 weights dequantised: one at a time, in fp32 and then in the compute precision."""
    return (4.0 + work.compute_bytes) * work.shape.largest if work.is_fp8 else 0.0


def _copies(work: Work, tier: Tier) -> float:
    """Autocast's copies of fp32 weights in the compute precision, kept through a step; fused layers make theirs one at a time."""
    if work.compute_bytes == 4:
        return 0.0
    if not work.is_full:
        return work.compute_bytes * float(work.trainable)
    layers = 0 if tier == "fused" else work.shape.layers * work.shape.layer_weights
    return work.compute_bytes * float(layers + work.shape.head_weights)


def _estimate(**parts: float) -> MemoryEstimate:
    in_gib = {f"{name}_gib": value / GIB for name, value in parts.items()}
    return MemoryEstimate(**in_gib, total_gib=sum(in_gib.values()))
