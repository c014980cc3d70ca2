"""Which bases an endpoint serves: from the words of STROP_BASES to weights in memory.

A word is `name[:quantization][:precision]`, as in `my-model:nf4-double:bf16`. Names are resolved through the registry, so
that the endpoint serves the weights that jobs were trained on; a word that can't be resolved stops the start, with all that
is wrong at once.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from sqlalchemy.orm import Session

from core.adapter import Quantization
from core.catalog import task_of
from core.errors import InvalidInput, Problem
from core.infer.adapters import AdaptedBase
from core.infer.servable import Servable
from core.model_folder import verify_code
from core.models.load import ComputeDtype, Precision, load_base
from store.deployments import RegisteredModel, find_models

_QUANTIZATIONS = tuple(name for name in get_args(Quantization) if name != "none")
_PRECISIONS = get_args(ComputeDtype)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What a base may take: GiB of the GPU for keys and values and for adapters, of pinned memory for adapters; requests at
    once."""

    kv_gib: float
    adapter_gib: float
    host_gib: float
    running: int


@dataclass(frozen=True)
class WantedBase:
    """One word of STROP_BASES, resolved."""

    word: str
    model: RegisteredModel
    quantization: Quantization
    precision: Precision


def resolve_bases(session: Session, words: Sequence[str]) -> list[WantedBase]:
    """Raises InvalidInput with every word that can't be read or names no registered model."""
    problems: list[Problem] = []
    parsed: list[tuple[str, str, Quantization, Precision]] = []
    for word in words:
        name, *options = word.split(":")
        quantization = options.pop(0) if options and options[0] in _QUANTIZATIONS else "none"
        precision = options.pop(0) if options and options[0] in _PRECISIONS else "auto"
        if options or not name:
            choices = "".join(f"[:{'|:'.join(names)}]" for names in (_QUANTIZATIONS, _PRECISIONS))
            problems.append(Problem("bad-base", f"{word}: is not name{choices}"))
        else:
            parsed.append((word, name, cast(Quantization, quantization), cast(Precision, precision)))
    found, known = find_models(session, [name for _, name, _, _ in parsed])
    registered = ", ".join(known) or "none yet"
    problems += [
        Problem("unknown-model", f"{word}: no model {name} is registered (registered: {registered})")
        for word, name, _, _ in parsed
        if name not in found
    ]
    problems += [
        Problem("wrong-task", f"{word}: {name} is a model for task {task}, which endpoints do not serve yet")
        for word, name, _, _ in parsed
        if name in found and (task := task_of((found[name].config.get("architectures") or ["unknown"])[0])) != "causal_lm"
    ]
    if not words:
        problems.append(Problem("no-bases", f"it is empty: name at least one model (registered: {registered})"))
    problems += [Problem("twice", f"{word}: named twice") for word in {w for w in words if list(words).count(w) > 1}]
    if problems:
        raise InvalidInput("STROP_BASES: " + "; ".join(problem.message for problem in problems), problems)
    return [WantedBase(word, found[name], quantization, precision) for word, name, quantization, precision in parsed]


def load_wanted(wanted: WantedBase, models_folder: Path, device: torch.device, *, room: Room) -> Servable:
    """Load a base and its tokenizer. Slow: seconds to minutes. Raises ArtifactError for code that is not the registered one."""
    folder = models_folder / wanted.model.folder
    if wanted.model.allow_remote_code:
        verify_code(folder, wanted.model.config)
    loaded = load_base(
        folder,
        name=wanted.model.name,
        weights=wanted.model.weights,
        quantization=wanted.quantization,
        precision=wanted.precision,
        device=device,
        allow_remote_code=wanted.model.allow_remote_code,
    )
    host = AdaptedBase(loaded, kv_gib=room.kv_gib, adapter_gib=room.adapter_gib, host_gib=room.host_gib)
    if host.runner is not None:
        logger.info("%s: %s", wanted.word, host.runner.form)
        host.runner.warm_up(room.running)
    return Servable(host, folder)


def limit_gpu_memory(device: torch.device, gib: float | None) -> None:
    """Keep this process within its share of the card: `gib`, or 0.9 of it. Raises ValueError for more than there is."""
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib is not None and gib > total:
        raise ValueError(f"STROP_SERVING_GPU_GIB is {gib:g}, and the card has {total:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(0.9 if gib is None else gib / total, device)
