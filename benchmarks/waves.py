"""Load on the inference engine: requests of random tokens, when their tokens came, and adapters of random weights to ask.

A request's times are taken where the engine hands a token over. In a wave all are submitted at once; a closed loop keeps a
number of clients busy; an open one submits by the clock (Poisson), whatever is finished, and counts from when a request was due.
"""

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from benchmarks.profile import LAUNCHES, Span, report
from core.infer.adapters import AdaptedBase
from core.infer.engine import GPU_STEP_TOKENS, RUNNING, STEP_TOKENS, Engine
from core.infer.progress import End, Token
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from core.infer.ticket import Failed, Item
from core.models.adapt import ADAPTER_WEIGHTS, PREFIX
from core.models.load import load_base, pick_device

RANK = 16
ADAPTER_GIB = 4.0
"""On a GPU; the 32 adapters of a case stay there."""


class NoMeasurementError(Exception):
    """Something else happened than what was to be measured; the message says what."""


@dataclass
class Asked:
    """One request: when it was due and when each of its tokens came, in seconds of one clock."""

    due: float
    ended: Callable[["Asked"], None]
    stamps: list[float] = field(default_factory=list)
    last: Item | None = None

    def __call__(self, item: Item) -> None:
        if isinstance(item, Token):
            self.stamps.append(time.perf_counter())
        else:
            self.last = item
            self.ended(self)

    @property
    def first_token_seconds(self) -> float:
        return self.stamps[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return np.diff(self.stamps).tolist()


class Bench:
    """A base in memory with its engine; what is asked are the base and `adapters`, in turn."""

    def __init__(self, folder: Path, *, kv_gib: float, most_clients: int, seed: int = 0) -> None:
        self.folder = folder
        base = load_base(
            folder, name=folder.name, weights="0" * 64, quantization="none", precision="auto", device=pick_device("auto")
        )
        self.host = AdaptedBase(base, kv_gib=kv_gib, adapter_gib=ADAPTER_GIB)
        if self.host.runner is None:
            raise NoMeasurementError(f"{folder.name}: packed steps can't express this model")
        self.base = Servable(self.host, folder)
        print(self.host.runner.form, flush=True)
        self.host.runner.warm_up(most_clients)
        self.engine = Engine(
            max_waiting=max(64, most_clients),
            running=max(RUNNING, most_clients),
            step_tokens=GPU_STEP_TOKENS if self.host.model.device.type == "cuda" else STEP_TOKENS,
        )
        self._rng = np.random.default_rng(seed)

    def close(self) -> None:
        self.engine.close()

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Random ids, others at each call, so that no prompt finds pages of an earlier one."""
        vocabulary = int(self.host.model.config.vocab_size)
        return [self._rng.integers(3, vocabulary, tokens).tolist() for _ in range(count)]

    def arrivals(self, count: int, rate: float) -> list[float]:
        """Seconds from the beginning, as a Poisson process of `rate` a second has them."""
        moments: list[float] = np.cumsum(self._rng.exponential(1 / rate, count)).tolist()
        return moments

    def served(self, folder: Path, digest: str) -> Servable:
        """Read an adapter folder and make it ready, as a deployment does."""
        assert self.host.runner is not None
        weights = self.host.runner.sites.read(folder, digest)
        if weights is None:
            raise NoMeasurementError(f"{folder.name}: packed steps can't express this adapter")
        self.engine.call(lambda: self.host.runner.sites.install(weights))  # type: ignore[union-attr]
        return Servable(self.host, self.folder, weights=weights)


def write_adapter(model: Any, folder: Path, seed: int) -> Path:
    """An adapter folder as peft writes it, rank 16 on all linear modules but the head; small random A and B."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    tensors, names = {}, set()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            names.add(path.rsplit(".", 1)[-1])
            for which, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                tensors[f"{PREFIX}{path}.lora_{which}.weight"] = (0.02 * torch.randn(shape, generator=generator)).to(model.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted(names), task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


def greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, ignore_eos=True)


def wave(engine: Engine, servables: Sequence[Servable], prompts: Sequence[list[int]], tokens: int) -> float:
    """Output tokens a second from the first submission to the last finish; request i asks `servables[i mod their number]`."""
    began = time.perf_counter()
    asked = closed(engine, servables, prompts, tokens, clients=len(prompts))
    return len(asked) * tokens / (max(one.stamps[-1] for one in asked) - began)


def closed(
    engine: Engine, servables: Sequence[Servable], prompts: Sequence[list[int]], tokens: int, *, clients: int
) -> list[Asked]:
    """Each client asks again when it is answered, until all prompts are."""
    ended: queue.Queue[Asked] = queue.Queue()
    asked = []
    for number, prompt in enumerate(prompts):
        if number >= clients:
            _check(ended.get(), tokens)
        asked.append(Asked(time.perf_counter(), ended.put))
        engine.submit(servables[number % len(servables)], prompt, greedy(tokens), asked[-1])
    for _ in range(min(clients, len(prompts))):
        _check(ended.get(), tokens)
    return asked


def opened(
    engine: Engine, servables: Sequence[Servable], prompts: Sequence[list[int]], tokens: int, *, at: Sequence[float]
) -> list[Asked]:
    """Prompt i is due `at[i]` seconds from now. Raises Unavailable where the engine's queue overflows."""
    ended: queue.Queue[Asked] = queue.Queue()
    began, asked = time.perf_counter(), []
    for number, (prompt, due) in enumerate(zip(prompts, at, strict=True)):
        time.sleep(max(0.0, began + due - time.perf_counter()))
        asked.append(Asked(began + due, ended.put))
        engine.submit(servables[number % len(servables)], prompt, greedy(tokens), asked[-1])
    for _ in prompts:
        _check(ended.get(), tokens)
    return asked


def profiled(engine: Engine, servables: Sequence[Servable], prompts: Sequence[list[int]], tokens: int) -> str:
    """Where the time of steps goes in which all answers run: kernels, launches of a step, how long the GPU has nothing to do."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    ended: queue.Queue[Asked] = queue.Queue()
    on_gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    asked = [Asked(time.perf_counter(), ended.put) for _ in prompts]

    def begin() -> tuple[float, int]:
        profiler.start()
        return time.perf_counter(), len(asked[0].stamps)

    def end() -> tuple[float, int]:
        if on_gpu:
            torch.cuda.synchronize()
        moment = time.perf_counter(), len(asked[0].stamps)
        profiler.stop()
        return moment

    def wait(count: int) -> None:
        while min(len(one.stamps) for one in asked) < count and ended.empty():
            time.sleep(0.001)

    for number, (one, prompt) in enumerate(zip(asked, prompts, strict=True)):
        engine.submit(servables[number % len(servables)], prompt, greedy(tokens), one)
    wait(tokens // 2)
    # The last steps before the profiler's, which slows the host down.
    gaps = sorted(np.diff(asked[0].stamps[1:]).tolist())
    began, first = engine.call(begin)
    wait(tokens * 3 // 4)
    stopped, last = engine.call(end)
    for _ in asked:
        _check(ended.get(), tokens)
    kernels, launches = [], 0
    for found in profiler.events() or ():
        if found.device_type == DeviceType.CUDA and not found.is_user_annotation:
            kernels.append(Span(found.name, found.time_range.start, found.time_range.end))
        launches += found.name.startswith(LAUNCHES)
    host = [(average.key, average.self_cpu_time_total, average.count) for average in profiler.key_averages()]
    usual = f"a step takes {gaps[len(gaps) // 2] * 1e3:.2f} ms without the profiler (median); with it:"
    return f"{usual}\n{report(kernels, host, launches=launches, steps=max(1, last - first), wall_seconds=stopped - began)}"


def _check(asked: Asked, tokens: int) -> None:
    if isinstance(asked.last, Failed):
        raise NoMeasurementError(asked.last.message)
    if not isinstance(asked.last, End) or len(asked.stamps) != tokens:
        raise NoMeasurementError(f"an answer has {len(asked.stamps)} tokens, and {tokens} were asked for")
