"""Where a step's time goes, and on a GPU its memory, in a process that `benchmarks.train --profile` starts.

Nothing of the product knows of it: the loop is a generator of events, and torch's profiler is started after one step and stopped
after a later one; then the allocator's history is kept for one step more. A profiled step is slower than another, the host's
part of it most of all; read the shares, not the seconds.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from core.run import read_run_input

PROFILED = 3
_SHOWN = 25
_SHOWN_HOST = 10
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
"""Calls of the host that start something on the device, by how their names begin."""
_NAME = 100
_GIB = 1 << 30


@dataclass(frozen=True)
class Span:
    """One kernel on the device, or one call on the host, in microseconds."""

    name: str
    start: float
    end: float


def main(run_dir: Path, warm_up: int) -> None:
    """Train the run in `run_dir` for its warm-up and the profiled steps; the report goes to stdout's last lines."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from core.train.loop import train

    on_gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    began = 0.0
    events = train(read_run_input(run_dir), run_dir, lambda: False)
    for event in events:
        if event.kind == "step" and event.step in (warm_up, warm_up + PROFILED):
            if on_gpu:
                torch.cuda.synchronize()
            if event.step > warm_up:
                break
            profiler.start()
            began = time.perf_counter()
    wall = time.perf_counter() - began
    profiler.stop()
    kernels, launches = [], 0
    for found in profiler.events():
        if found.device_type == DeviceType.CUDA and not found.is_user_annotation:
            kernels.append(Span(found.name, found.time_range.start, found.time_range.end))
        launches += found.name.startswith(LAUNCHES)
    host = [(average.key, average.self_cpu_time_total, average.count) for average in profiler.key_averages()]
    print(report(kernels, host, launches=launches, steps=PROFILED, wall_seconds=wall), flush=True)
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.memory._record_memory_history(stacks="python")
        next(event for event in events if event.kind == "step")
        (trace,) = [trace for trace in torch.cuda.memory._snapshot()["device_traces"] if trace]
        print(memory_report(trace, before))
    events.close()


def report(kernels: list[Span], host: Iterable[tuple[str, float, int]], *, launches: int, steps: int, wall_seconds: float) -> str:
    """`host` is (operator, its own microseconds, calls) over all profiled steps."""
    lines = [f"{steps} steps, {wall_seconds / steps * 1e3:.1f} ms each"]
    if kernels:
        busy = busy_microseconds(kernels) / 1e6
        lines[0] += f", the GPU busy for {busy / wall_seconds:.1%} of the time"
        lines.append(f"{len(kernels) / steps:.0f} kernels and copies a step, by {launches / steps:.0f} launches of the host")
        taken: dict[str, list[float]] = {}
        for kernel in kernels:
            taken.setdefault(kernel.name, []).append(kernel.end - kernel.start)
        lines += ["", "kernels by time: ms a step, share of the step, calls a step"]
        for name, times in sorted(taken.items(), key=lambda item: -sum(item[1]))[:_SHOWN]:
            each = sum(times) / 1e3 / steps
            lines.append(f"{each:9.3f}  {sum(times) / 1e6 / wall_seconds:6.1%}  {len(times) / steps:7.1f}  {name[:_NAME]}")
    lines += ["", "host's operators by their own time: ms a step, calls a step"]
    for name, microseconds, calls in sorted(host, key=lambda item: -item[1])[:_SHOWN_HOST]:
        lines.append(f"{microseconds / 1e3 / steps:9.3f}  {calls / steps:7.1f}  {name[:_NAME]}")
    return "\n".join(lines)


def memory_report(trace: Sequence[Mapping[str, Any]], before: int) -> str:
    """Who asked for what stood in memory when most did. `trace` is the allocator's, `before` the bytes that stood at its start.

    Bytes that were there before are one sum: weights, states, and gradients of an earlier step.
    """
    total = peak = before
    until = 0
    for number, entry in enumerate(trace):
        total += entry["size"] * {"alloc": 1, "free_completed": -1}.get(entry["action"], 0)
        if total > peak:
            peak, until = total, number + 1
    blocks: dict[int, Mapping[str, Any]] = {}
    for entry in trace[:until]:
        if entry["action"] == "alloc":
            blocks[entry["addr"]] = entry
        elif entry["action"] == "free_completed" and blocks.pop(entry["addr"], None) is None:
            before -= entry["size"]
    taken: dict[str, list[int]] = {}
    for entry in blocks.values():
        taken.setdefault(_place(entry["frames"]), []).append(entry["size"])
    lines = ["", f"memory at the peak of a step: {peak / _GIB:.3f} GiB, {before / _GIB:.3f} of them from before it", ""]
    lines += ["held since, by who asked: GiB, blocks"]
    for place, sizes in sorted(taken.items(), key=lambda item: -sum(item[1]))[:_SHOWN]:
        lines.append(f"{sum(sizes) / _GIB:9.3f}  {len(sizes):6}  {place}")
    return "\n".join(lines)


def _place(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost line of ours, or of whoever asked; autograd's own thread has no line of Python."""
    for frame in [*(frame for frame in frames if f"{ROOT}/core/" in frame["filename"]), *frames]:
        return f"{frame['filename'].removeprefix(f'{ROOT}/')}:{frame['line']} {frame['name']}"
    return "autograd"


def busy_microseconds(kernels: list[Span]) -> float:
    """Time in which at least one of them ran."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return busy


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
