"""What the steps of a job hold and compute, counted in tokens: the tier, the micro-batches, and what the lengths say of both.

Lengths are known by three sums (rows, tokens, squared tokens) and the longest; between them rows are taken to be log-normal, as
instruction data is. N is tokens.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from core.catalog import Tier, can_pack
from core.plan.shape import ModelShape, adapted_modules, model_shape, new_parameters, trainable_parameters
from core.records import TokenCounts
from core.spec import (
    DATA_KINDS,
    Fp4Quantization,
    Fp8Quantization,
    FullTuning,
    Int8Quantization,
    JobSpec,
    LoraTuning,
    MoraTuning,
    Nf4Quantization,
    ScheduleSpec,
)

_LIGER = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "glm4", "smollm3"})
"""Families whose norms and gates liger has kernels for (0.8); with the others the packed tier keeps what the plain one does."""
_SPREAD = 1.43
"""Mean square over squared mean of the lengths where no sum of squares was stored: log-normal of sigma 0.6."""
_STEPS_UNKNOWN = 100
RECORDED_ROWS = 32
"""What the rows of a recorded decoder, and one of padding, are rounded up to a multiple of (core.train.fused.graphs)."""
_4BIT_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Four bits, and a scale per block of 64: fp32, or quantised itself in blocks of 256 (arXiv 2305.14314)."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of an example, of all its sequences together; `longest` of one sequence."""

    mean: float
    deviation: float
    longest: int
    attended: float
    """Mean length of the sequence that a token stands in."""
    trained: float
    """Share of the tokens that carry loss."""

    def at(self, share: float) -> float:
        """Length of a sequence that `share` of all are shorter than."""
        sigma = math.sqrt(math.log1p((self.deviation / self.mean) ** 2))
        middle = math.log(self.mean) - sigma**2 / 2
        return min(math.exp(middle + sigma * NormalDist().inv_cdf(share)), self.longest)


@dataclass(frozen=True)
class Work:
    """A job as its memory and its time see it."""

    spec: JobSpec
    shape: ModelShape
    parameters: int
    trainable: int
    tier: Tier
    has_kernels: bool
    """Norms and gates are kernels that keep their input alone (liger's); of no account where fused layers have their own."""
    held_tokens: int
    """In memory at once at most, padding included."""
    held_sequences: int
    """Those that they stand in."""
    longest: int
    """Tokens of a sequence at most."""
    held_trained: int
    """Of those held, the ones that carry loss."""
    probed_tokens: int
    """Held by the plain tier before a packed run's first step; 0 where there is no such probe."""
    micro_batches: float
    """Of a step, on average."""
    most_micro_batches: int
    step_tokens: float
    """Of a step on average, without padding."""
    computed_tokens: float
    """The same with padding: what goes through the layers."""
    attended: float
    """Mean length of the line, padding included, that a token stands in."""
    trained_tokens: float
    """Of a step on average."""

    @property
    def adapted(self) -> list[str]:
        """Leaf names of a layer's modules with an adapter; none in full tuning."""
        tuning = self.spec.tuning
        return adapted_modules(self.shape, tuning) if isinstance(tuning, LoraTuning | MoraTuning) else []

    @property
    def is_full(self) -> bool:
        return isinstance(self.spec.tuning, FullTuning)

    @property
    def compute_bytes(self) -> int:
        """Of a number in the compute precision; `auto` counts as bf16."""
        return 4 if self.spec.memory.precision == "fp32" else 2

    @property
    def stream_bytes(self) -> int:
        """Of a token in the residual stream: what a checkpointed layer keeps of it."""
        return self.shape.hidden * (4 if self.is_full else self.compute_bytes)

    @property
    def packed_bytes(self) -> float | None:
        """Per quantised weight; None where nothing is."""
        quantization = self.spec.quantization
        if isinstance(quantization, Nf4Quantization | Fp4Quantization):
            return _4BIT_BYTES[quantization.double_quantization]
        is_eight = isinstance(quantization, Int8Quantization | Fp8Quantization)
        return 1.0 if is_eight else None  # a scale per output is next to nothing

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.spec.quantization, Fp8Quantization)

    @property
    def is_recorded(self) -> bool:
        """The decoder runs as graphs: fused layers that the host takes no part in."""
        return self.tier == "fused" and not self.spec.memory.checkpointing_offload

    @property
    def recomputed_layers(self) -> int:
        """How many layers are checkpointed."""
        memory = self.spec.memory
        return math.ceil(self.shape.layers / memory.checkpointing_every) if memory.checkpointing else 0


def work_of(
    spec: JobSpec,
    *,
    architecture: str,
    parameters: int,
    config: dict[str, Any],
    counts: list[TokenCounts] | None,
    steps: int | None,
) -> Work:
    """`counts` of all datasets, or None: then every row is as long as it may be. `parameters` are the model's as registered."""
    shape = model_shape(architecture, config)
    parameters += new_parameters(spec, shape)
    tier = tier_of(spec, architecture, config)
    rows, held_rows = spec.batch.step_rows, spec.batch.rows_at_once
    sequences = 2 if DATA_KINDS[spec.objective.kind] == "preference" else 1  # both answers of a pair are in memory at once
    lengths = lengths_of(spec, counts, sequences)
    step_tokens = rows * lengths.mean
    if tier == "plain":
        held_sequences = held_rows * sequences
        held = held_sequences * lengths.longest
        micro_batches = most = float(math.ceil(rows / held_rows))
        lines = [_line(lengths, sequences, first, min(held_rows, rows - first), rows) for first in range(0, rows, held_rows)]
        computed = sum(rows * line for rows, line in lines)
        attended = sum(rows * line**2 for rows, line in lines) / computed
        probed, carried = 0, held
    else:
        room = max(held_rows * spec.data.max_length, sequences * lengths.longest if counts is not None else 0)
        most_tokens = min(step_tokens + _highest(steps) * lengths.deviation * math.sqrt(rows), rows * sequences * lengths.longest)
        held = carried = math.ceil(min(room, most_tokens))
        micro_batches, most = math.ceil(step_tokens / room), math.ceil(most_tokens / room)
        held_sequences = min(rows * sequences, math.ceil(held * sequences / lengths.mean))
        computed, attended = step_tokens, lengths.attended
        if tier == "fused" and not spec.memory.checkpointing_offload:  # a micro-batch is rounded up, by half a piece on average
            computed += micro_batches * fineness(held) / 2
            held = math.ceil(held / fineness(held)) * fineness(held)
            held_sequences = math.ceil((held_sequences + 1) / RECORDED_ROWS) * RECORDED_ROWS
        probed = sequences * lengths.longest  # one example at a time
    return Work(
        spec=spec,
        shape=shape,
        parameters=parameters,
        trainable=trainable_parameters(spec, shape, parameters),
        tier=tier,
        has_kernels=tier != "plain" and shape.family in _LIGER,
        held_tokens=held,
        held_sequences=held_sequences,
        longest=lengths.longest,
        held_trained=math.ceil(carried * lengths.trained),
        probed_tokens=probed,
        micro_batches=micro_batches,
        most_micro_batches=int(most),
        step_tokens=step_tokens,
        computed_tokens=computed,
        attended=attended,
        trained_tokens=step_tokens * lengths.trained,
    )


def tier_of(spec: JobSpec, architecture: str, config: dict[str, Any]) -> Tier:
    """The tier that a GPU will choose, as far as the config tells (core.train.tier): nobody knows yet if its rows agree."""
    if spec.batch.packing == "off" or spec.memory.precision == "fp32":
        return "plain"
    if can_pack(architecture, config, spec.data.max_length) is not None:
        return "plain"
    return "fused" if spec.memory.fused_layers else "packed"


def fineness(tokens: int) -> int:
    """What the tokens of a recorded decoder are rounded up to a multiple of (core.train.fused.graphs)."""
    return max(128, 1 << max(0, round(math.log2(tokens)) - 5))


def count_steps(rows_per_epoch: int, rows_per_step: int, schedule: ScheduleSpec) -> int:
    """Optimizer steps of a job: an epoch ends with what rows are left, a fraction of one is rounded up to whole steps."""
    per_epoch = math.ceil(rows_per_epoch / rows_per_step)
    steps = max(1, math.ceil(schedule.epochs * per_epoch - 1e-9))  # 0.1 · 30 is a hair above 3
    return steps if schedule.max_steps is None else min(steps, schedule.max_steps)


def steps_of(spec: JobSpec, counts: list[TokenCounts], eval_rows: int) -> int:
    """Steps of a job whose datasets have these counts, `eval_rows` of all their examples held out."""
    weights = {ref.dataset_id: ref.weight for ref in spec.data.datasets}
    usable = {c.dataset_id: c.examples for c in counts}
    # Held-out rows are drawn from all datasets alike, so each gives its share.
    share = eval_rows / sum(usable.values())
    draws = [max(1, round(weights[d] * round(rows * (1 - share)))) for d, rows in usable.items() if round(rows * (1 - share))]
    return count_steps(sum(draws), spec.batch.step_rows, spec.schedule)


def lengths_of(spec: JobSpec, counts: list[TokenCounts] | None, sequences: int) -> Lengths:
    """Of the examples a step draws, each dataset by its weight. What they are before they are tokenised: as long as may be."""
    longest = spec.data.max_length
    weights = {ref.dataset_id: ref.weight for ref in spec.data.datasets}
    known = [count for count in counts or [] if count.examples and count.tokens]
    if not known:
        return Lengths(sequences * longest, 0.0, longest, longest, 1.0)
    examples = sum(weights[c.dataset_id] * c.examples for c in known)
    tokens = sum(weights[c.dataset_id] * c.tokens for c in known)
    trained = sum(weights[c.dataset_id] * c.trained_tokens for c in known)
    squares = sum(weights[c.dataset_id] * _squares(c, sequences) for c in known)
    mean = tokens / examples
    # Both sequences of a pair share a prompt, so a pair's length varies as one sequence does.
    deviation = math.sqrt(max(0.0, squares * sequences / examples - mean**2))
    return Lengths(mean, deviation, min(longest, max(c.longest for c in known)), squares / tokens, trained / tokens)


def _squares(count: TokenCounts, sequences: int) -> float:
    if count.squared_tokens is not None:
        return count.squared_tokens
    return _SPREAD * count.tokens**2 / (count.examples * sequences)


def _line(lengths: Lengths, sequences: int, first: int, rows: int, of: int) -> tuple[int, float]:
    """(lines, their length) of the padded micro-batch that begins with the step's `first`-longest example."""
    share = 1 - (first + 0.5) / of
    return rows * sequences, lengths.at(share) / sequences


def _highest(steps: int | None) -> float:
    """How many deviations above the mean the largest of so many steps is (Blom 1958)."""
    steps = _STEPS_UNKNOWN if steps is None else max(steps, 1)
    return NormalDist().inv_cdf((steps - 0.375) / (steps + 0.25)) if steps > 1 else 0.0
