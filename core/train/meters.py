"""Time and memory of a step, in the units the events carry."""

import time

import psutil
import torch

GIB = float(1 << 30)


class StepClock:
    """Seconds of training steps alone; what is done between `stop` and `start` (evaluation, saving) counts for nothing."""

    def __init__(self) -> None:
        self._started = 0.0
        self._usual: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> float:
        """Seconds since `start`."""
        seconds = time.perf_counter() - self._started
        # The first step of a process pays for warm-up and is forgotten soon.
        self._usual = seconds if self._usual is None else 0.8 * self._usual + 0.2 * seconds
        return seconds

    def eta_seconds(self, steps_left: int) -> float:
        return steps_left * (self._usual or 0.0)


def memory_gib(device: torch.device) -> dict[str, float | None]:
    """GPU: what tensors hold, what the caching allocator holds, and the most tensors ever held. Everywhere: the process's RSS."""
    rss = psutil.Process().memory_info().rss / GIB
    if device.type != "cuda":
        return {"allocated_gib": None, "reserved_gib": None, "peak_allocated_gib": None, "rss_gib": rss}
    return {
        "allocated_gib": torch.cuda.memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.memory_reserved(device) / GIB,
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "rss_gib": rss,
    }
