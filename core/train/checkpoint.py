"""Everything a run needs to go on as if nothing had happened: weights, optimizer, chance, scale, position, judgements.

A checkpoint is a closed folder (`core.manifest`) of safetensors and JSON; nothing in it is ever unpickled. On a CPU in fp32
the losses after a resume equal those of an uninterrupted run bit for bit. Which checkpoints are kept or resumed from is
decided by the supervisor.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from core.errors import ArtifactError
from core.manifest import closed_folder, read_manifest
from core.run import CHECKPOINT_KIND
from core.spec import JobSpec, upgrade_spec
from core.train.device import random_state, set_random_state
from core.train.optim import optimizer_state, restore_optimizer
from core.train.training import Training

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"


def write_checkpoint(training: Training, folder: Path, *, step: int, job_id: str, spec: JobSpec) -> None:
    """Close a checkpoint of the moment after `step` at `folder`."""
    facts = {"job_id": job_id, "step": step, "rows": training.rows.fingerprint}
    tensors, numbers = optimizer_state(training.trainable(), training.optimizer)
    python_version, python_words, python_gauss = random.getstate()
    numpy_name, numpy_words, *numpy_rest = np.random.get_state(legacy=True)
    state = {
        "spec": spec.model_dump(mode="json"),
        "optimizer": numbers,
        "python": [python_version, list(python_words), python_gauss],
        "numpy": [numpy_name, np.asarray(numpy_words).tolist(), *numpy_rest],
        "watchdog": training.watchdog.state(),
        "selection": training.selection.state(),
        "scaler": None if training.accelerator.scaler is None else training.accelerator.scaler.state_dict(),
    }
    with closed_folder(folder, CHECKPOINT_KIND, facts) as draft:
        save_file(_on_cpu(dict(training.trainable())), draft / WEIGHTS_FILE)
        save_file(_on_cpu(tensors), draft / OPTIMIZER_FILE)
        save_file(random_state(training.device), draft / RANDOM_FILE)
        if best := training.selection.tensors():
            save_file(best, draft / BEST_FILE)
        (draft / STATE_FILE).write_text(json.dumps(state))


def restore_checkpoint(training: Training, folder: Path, *, spec: JobSpec) -> int:
    """Put a run back to where `folder` was written and return that step.

    Raises ArtifactError for a checkpoint of another spec, of other data, or of other parameters.
    """
    manifest = read_manifest(folder)
    facts = manifest["facts"]
    if manifest["kind"] != CHECKPOINT_KIND:
        raise ArtifactError(f"{folder.name}: holds a {manifest['kind']}, not a {CHECKPOINT_KIND}")
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    # As today's spec: a field that a later version adds makes no other job of it.
    written = upgrade_spec(state["spec"])
    if written != spec:
        other = [name for name in JobSpec.model_fields if getattr(written, name) != getattr(spec, name)]
        raise ArtifactError(f"{folder.name}: written for another spec: {', '.join(other)}")
    if facts["rows"] != training.rows.fingerprint:
        raise ArtifactError(f"{folder.name}: written over other rows; the datasets' tokens have changed since")
    weights = load_file(folder / WEIGHTS_FILE)
    parameters = dict(training.trainable())
    if set(weights) != set(parameters):
        odd = sorted(set(weights) ^ set(parameters))
        raise ArtifactError(f"{folder.name}: {len(odd)} parameters on one side only, first {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    inner = training.optimizer.optimizer  # accelerate's wrapper has no init_state
    restore_optimizer(training.trainable(), inner, load_file(folder / OPTIMIZER_FILE), state["optimizer"])
    if training.accelerator.scaler is not None:
        training.accelerator.scaler.load_state_dict(state["scaler"])
    python_version, python_words, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_words), python_gauss))
    numpy_name, numpy_words, *numpy_rest = state["numpy"]
    np.random.set_state((numpy_name, np.array(numpy_words, dtype=np.uint32), *numpy_rest))
    training.watchdog.restore(state["watchdog"])
    training.selection.restore(state["selection"])
    if (folder / BEST_FILE).is_file():
        training.selection.restore_tensors(load_file(folder / BEST_FILE))
    set_random_state(load_file(folder / RANDOM_FILE), training.device)
    step: int = facts["step"]
    return step


def _on_cpu(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    # A clone each: bitsandbytes shares one code table among all parameters, and the format refuses shared memory.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
