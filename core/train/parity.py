"""The parity record: what a finished result answers, measured as its loader will, so that the loader can be held to it.

Up to four known sequences, short; the numbers of the trained model and of the bare base. Written into the adapter folder
before its manifest closes. The endpoint repeats it with `core.eval.logprobs` before the adapter becomes routable.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from core.adapter import BaseIdentity, ParityProbe, ParityRecord
from core.eval.logprobs import sequence_logprobs
from core.eval.rows import Row
from core.models.adapt import load_adapter
from core.models.load import load_base

Probe = tuple[list[int], int]
"""(token ids, start), as `sequence_logprobs` takes them."""

_PROBES = 4
_TOKENS = 128
_CONTEXT = 64


def probe_sequences(rows: Sequence[Row]) -> list[Probe]:
    """The first rows, cut to 128 tokens of which at most 64 stand before the first trained one."""
    probes = []
    for ids, mask in rows[:_PROBES]:
        first = 1 + int(np.argmax(mask[1:] != 0))
        begin = max(0, first - _CONTEXT)
        probes.append((ids[begin : begin + _TOKENS].tolist(), first - begin))
    return probes


def measure_lora(model: PeftModel, folder: Path, sequences: Sequence[Probe], base: BaseIdentity) -> ParityRecord:
    """The adapter as read back from `folder` onto the base it was trained on, against that base alone.

    Leaves the adapter as read active, and the model in eval mode.
    """
    load_adapter(model, folder, "saved")
    model.set_adapter("saved")
    model.eval()
    trained = [sequence_logprobs(model, *sequence) for sequence in sequences]
    with model.disable_adapter():
        bare = [sequence_logprobs(model, *sequence) for sequence in sequences]
    return _record(sequences, trained, bare, base, model.device)


def measure_full(model: Any, model_folder: Path, sequences: Sequence[Probe], base: BaseIdentity) -> ParityRecord:
    """The trained model, already in the dtype it was written in, against a fresh load of the base. Leaves it in eval mode.

    The base has no say where a sequence holds new tokens that it has no rows for.
    """
    model.eval()
    trained = [sequence_logprobs(model, *sequence) for sequence in sequences]
    fresh = load_base(
        model_folder,
        name=base.model,
        weights=base.weights,
        quantization="none",
        precision=base.compute_dtype,
        device=model.device,
    )
    known = fresh.model.config.vocab_size
    bare = [sequence_logprobs(fresh.model, ids, start) if max(ids) < known else [] for ids, start in sequences]
    return _record(sequences, trained, bare, base, model.device)


def _record(
    sequences: Sequence[Probe],
    trained: list[list[float]],
    bare: list[list[float]],
    base: BaseIdentity,
    device: torch.device,
) -> ParityRecord:
    probes = [
        ParityProbe(token_ids=ids, start=start, logprobs=logprobs, base_logprobs=base_logprobs)
        for (ids, start), logprobs, base_logprobs in zip(sequences, trained, bare, strict=True)
    ]
    return ParityRecord(device=device.type, compute_dtype=base.compute_dtype, probes=probes)
