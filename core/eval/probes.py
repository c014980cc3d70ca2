"""What a model says to known sequences, and what each module of its adapter adds meanwhile: both sides of the parity record.

The training child measures a finished result with `measure` and writes the numbers beside the weights; the endpoint measures
what it has loaded the same way, in the same batches, and compares. No autocast: what is left is the model. Sequences of a
batch are padded on the right without an attention mask: behind them, where a causal model doesn't look.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from core.models.traces import Trace, touched_modules, tracing

Known = tuple[list[int], int]
"""(token ids, start): log-probabilities are taken of the tokens from `start` ≥ 1 on."""

LAST_POSITIONS = 4
_BATCH = 5


@dataclass(frozen=True)
class Said:
    """Of one sequence. `logprobs` in nats; `last` fp32 [positions, vocabulary] after its last tokens, on the model's device."""

    logprobs: list[float]
    last: torch.Tensor


def batches(sequences: Sequence[Known]) -> list[list[Known]]:
    """The first sequence alone, since traces are taken of it and must hold no padding, then a few at a time."""
    cuts = [0, *range(1, len(sequences), _BATCH), len(sequences)]
    return [list(sequences[begin:end]) for begin, end in pairwise(cuts) if end > begin]


@torch.inference_mode()
def measure(model: Any, batch: Sequence[Known], traced: str | None = None) -> tuple[list[Said], dict[str, Trace]]:
    """One forward pass over a batch: what is said of each sequence, and the traces of an adapter's modules.

    `model` is a causal LM of transformers, with or without peft, in eval mode, in its own dtype, its adapter active if it is
    to speak. `traced` names the adapter whose modules are traced. Raises ValueError for a start that no token stands before.
    """
    for ids, start in batch:
        if not 1 <= start < len(ids):
            raise ValueError(f"start {start} is not within 1 .. {len(ids) - 1}")
    longest = max(len(ids) for ids, _ in batch)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch], device=model.device)
    with tracing(touched_modules(model, traced) if traced is not None else []) as traces:
        logits = model(input_ids=padded, use_cache=False).logits
    return [said_of(row, ids, start) for row, (ids, start) in zip(logits, batch, strict=True)], traces


def said_of(logits: torch.Tensor, ids: list[int], start: int) -> Said:
    """What the logits [≥ len(ids), V] behind each token of a sequence say."""
    table = torch.log_softmax(logits[start - 1 : len(ids) - 1].float(), dim=-1)
    asked = torch.tensor(ids[start:], device=logits.device)
    logprobs = table.gather(1, asked[:, None]).squeeze(1).tolist()
    return Said(logprobs, logits[max(0, len(ids) - LAST_POSITIONS) : len(ids)].float())


def relative_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """|one - other| / |other|, over all entries."""
    return float((one - other).norm() / other.norm())


def base_distance(said: Said, base: Said, ids: Sequence[Sequence[int]]) -> float:
    """How far the logits of `ids` (a row per last token) are from the base's.

    A model with new tokens may rank some that its base has no logit for: these have no say.
    """
    shared = [[i for i in some if i < base.last.shape[-1]] for some in ids]
    one, other = (torch.cat([row[some] for row, some in zip(each.last, shared, strict=True)]) for each in (said, base))
    return relative_distance(one, other) if len(one) else 0.0
