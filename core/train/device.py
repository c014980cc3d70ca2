"""Device, numbers and chance: everything about a run that would be global state if it were not set in one place."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from core.errors import CudaOutOfMemory
from core.models.load import ComputeDtype
from core.train.meters import GIB


def make_accelerator(device: torch.device, compute: ComputeDtype) -> Accelerator:
    """Autocast, loss scaling (fp16 only), backward and clipping for one device."""
    # accelerate keeps its state for the life of a process and refuses another precision; a run is told, it never inherits.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no" if compute == "fp32" else compute)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed torch, numpy and Python. On a CPU the run is then deterministic for a given number of threads."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # On a GPU determinism costs speed and a process-wide cuBLAS setting, and is not offered.
    torch.use_deterministic_algorithms(device.type == "cpu")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Where torch's generators stand: what dropout draws from."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def out_of_memory_named(device: torch.device) -> Iterator[None]:
    """Turn the allocator's error into one that says how much was in use and which knobs turn it down."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = total = 0.0
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / GIB
            total = torch.cuda.get_device_properties(device).total_memory / GIB
        raise CudaOutOfMemory(
            f"the GPU ran out of memory: {peak:.2f} GiB of tensors at the peak, {total:.2f} GiB on the device. "
            "Lower batch.micro_batch_size (and raise batch.gradient_accumulation_steps by the same factor), "
            "lower data.max_length, or turn on memory.checkpointing"
        ) from error
