"""How fast the endpoint answers: `python -m benchmarks.serve --cases 8b/base/c32,8b/8-adapters/c32 --models DIR` on a GPU.

A case is model/adapters/clients. Its speed is that of a wave: so many requests at once, distinct random prompts of 128 tokens
(so that no prompt finds another's pages), 128 tokens out whatever they say, output tokens from first submission to last finish,
median of waves after one that warms up. Adapters have rank 16 on all linear modules and are asked in turn. `retention` is the
adapters' speed over the bare base's, wave by wave in turns, with 32 clients. `8-clients` is the engine over one-by-one
`core.infer.generate` of the same prompts (64 in, 64 out), in turns too: where a machine is shared with others, the best of each
side counts, and the spread is that of the pairs. `cold-adapter` is from reading an adapter's folder (in the page cache) to its
first token, over the same for one in memory. `http` streams the 8-adapter wave out of a running endpoint, by a client in another
process, over the same engine asked directly. `ready` is from the start of the endpoint's process to a token over HTTP.
`train-to-serve` is from a training's end to its adapter's first token in a whole service (benchmarks/train_to_serve.py).

Models are loaded once for all their cases. `--profile` prints the kernels of a wave's decode steps, their launches and how long
the GPU has nothing to do. `--baseline` puts plain transformers and peft beside each wave, `--loop closed` or
`open` with `--rate` the times to first token and between tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import FOLDER, Results
from benchmarks.shapes import made

MODELS = {"tiny": "tiny", "8b": "llama3.1-8b", "1.1b": "llama-1.1b", "cpu-135m": "smollm2-135m"}
"""Model of a case -> shape."""
TARGETS: dict[str, tuple[str, float, float]] = {
    "8b/base/c32": ("tokens_per_second", 3100, 4000),
    "8b/8-adapters/c32": ("tokens_per_second", 2620, 3700),
    "8b/8-adapters/c128": ("tokens_per_second", 5500, 9000),
    "1.1b/8-adapters/c32": ("tokens_per_second", 6300, 12_000),
    "8b/8-adapters/c1": ("tokens_per_second", 100, 150),
    "8b/retention-1": ("share_of_base", 0.90, 0.97),
    "8b/retention-8": ("share_of_base", 0.85, 0.93),
    "8b/retention-32": ("share_of_base", 0.70, 0.80),
    "8b/cold-adapter": ("added_first_token_ms", 150, 40),
    "8b/train-to-serve": ("ended_to_first_token_seconds", 5, 2),
    "8b/http": ("share_of_engine", 0.90, 0.97),
    "8b/ready": ("started_to_first_token_seconds", 60, 25),
    "cpu-135m/8-clients": ("times_one_by_one", 4, 6),
}
"""Case -> (metric, must, aim), on one H100 80GB but for the last."""
CASES = list(TARGETS)
RETENTION_CLIENTS = 32
COLD_TRIES = 9


class Cases:
    """The cases of one model; it is loaded, and adapters are written, when first asked for."""

    def __init__(self, results: Results, model: Path, work: Path, arguments: argparse.Namespace) -> None:
        from benchmarks.waves import Bench, write_adapter

        self._results = results
        self._model = model
        self._work = work
        self._waves = arguments.waves
        self._arguments = arguments
        self._bench = Bench(model, kv_gib=arguments.kv_gib, most_clients=arguments.most_clients)
        self._write = write_adapter
        self._adapters: list[Any] = []

    def close(self) -> None:
        self._bench.close()

    def measure(self, name: str) -> None:
        """Add the rows of a case. Raises NoMeasurementError."""
        what = name.split("/", 1)[1]
        kind, _, number = what.partition("-")
        if what == "cold-adapter":
            self._cold(name)
        elif kind == "retention":
            self._retention(name, int(number))
        elif what.endswith("-clients"):
            self._one_by_one(name, int(kind))
        else:
            self._wave(name, 0 if what.startswith("base/") else int(kind), int(what.rpartition("/c")[2]))

    def _servables(self, adapters: int) -> list[Any]:
        while len(self._adapters) < adapters:
            self._adapters.append(self._bench.served(self._folder(len(self._adapters)), f"adapter {len(self._adapters)}"))
        return self._adapters[:adapters] if adapters else [self._bench.base]

    def _folder(self, number: int) -> Path:
        folder = self._work / "adapters" / f"a{number}"
        return folder if folder.exists() else self._write(self._bench.host.model, folder, number)

    def _speed(self, servables: list[Any], clients: int) -> float:
        from benchmarks.waves import wave

        asked = self._arguments
        return wave(self._bench.engine, servables, self._bench.prompts(clients, asked.prompt_tokens), asked.tokens)

    def _wave(self, name: str, adapters: int, clients: int) -> None:
        servables = self._servables(adapters)
        self._speed(servables, clients)
        speeds = [self._speed(servables, clients) for _ in range(self._waves)]
        self._add_median(name, "tokens_per_second", speeds, "tokens/s")
        if self._arguments.profile:
            self._profile(name, servables, clients)
        if self._arguments.loop:
            self._loop(name, servables, clients)
        if self._arguments.baseline:
            self._baseline(name, adapters, clients)

    def _profile(self, name: str, servables: list[Any], clients: int) -> None:
        from benchmarks.waves import profiled

        asked = self._arguments
        found = profiled(self._bench.engine, servables, self._bench.prompts(clients, asked.prompt_tokens), asked.tokens)
        print(f"{name}: steps in which all {clients} answers run\n{found}", flush=True)

    def _retention(self, name: str, adapters: int) -> None:
        sides = [self._servables(0), self._servables(adapters)]
        for side in sides:
            self._speed(side, RETENTION_CLIENTS)
        pairs = [[self._speed(side, RETENTION_CLIENTS) for side in sides] for _ in range(self._waves)]
        self._add_median(name, "share_of_base", [adapted / base for base, adapted in pairs], "")

    def _one_by_one(self, name: str, clients: int) -> None:
        from benchmarks.waves import greedy, wave
        from core.infer.generate import generate

        bench, tokens = self._bench, self._arguments.tokens // 2
        together, alone = [], []
        for repetition in range(self._waves + 1):
            prompts = bench.prompts(clients, self._arguments.prompt_tokens // 2)
            speed = wave(bench.engine, [bench.base], prompts, tokens)
            began = time.perf_counter()
            for prompt in prompts:
                list(generate(bench.host.model, prompt, greedy(tokens), bench.base.tokenizer, bench.base.stop_ids))
            if repetition:  # the first warms up
                together.append(speed)
                alone.append(clients * tokens / (time.perf_counter() - began))
                print(f"{name}: {together[-1]:.1f} together, {alone[-1]:.1f} one by one", flush=True)
        self._add(name, "best_tokens_per_second", max(together), "tokens/s", n=self._waves)
        self._add(name, "best_one_by_one_tokens_per_second", max(alone), "tokens/s", n=self._waves)
        spread = spread_of([one / other for one, other in zip(together, alone, strict=True)])
        self._add(name, "times_one_by_one", max(together) / max(alone), "times", n=self._waves, spread=spread)

    def _cold(self, name: str) -> None:
        from benchmarks.waves import closed

        def first_token(get: Callable[[], Any]) -> float:
            (prompt,) = self._bench.prompts(1, self._arguments.prompt_tokens)
            began = time.perf_counter()
            (asked,) = closed(self._bench.engine, [get()], [prompt], 2, clients=1)
            return asked.stamps[0] - began

        (resident,) = self._servables(1)
        folders = [self._folder(number) for number in range(1, COLD_TRIES + 2)]
        pairs = [
            (first_token(lambda: resident), first_token(lambda folder=folder: self._bench.served(folder, folder.name)))  # type: ignore[misc]
            for folder in folders
        ][1:]
        added = [1000 * (cold - warm) for warm, cold in pairs]
        self._add_median(name, "added_first_token_ms", added, "ms", better="lower")
        self._add_median(name, "resident_first_token_ms", [1000 * warm for warm, _ in pairs], "ms", better="lower")

    def _loop(self, name: str, servables: list[Any], clients: int) -> None:
        from benchmarks.waves import closed, opened

        asked = self._arguments
        prompts = self._bench.prompts(asked.requests, asked.prompt_tokens)
        if asked.loop == "open":
            at = self._bench.arrivals(asked.requests, asked.rate)
            found = opened(self._bench.engine, servables, prompts, asked.tokens, at=at)
            row = f"{name}/open-{asked.rate:g}"
        else:
            found = closed(self._bench.engine, servables, prompts, asked.tokens, clients=clients)
            row = f"{name}/closed"
        seconds = max(one.stamps[-1] for one in found) - found[0].due
        self._add(row, "tokens_per_second", len(found) * asked.tokens / seconds, "tokens/s", n=len(found))
        for metric, values in (
            ("first_token_ms", [one.first_token_seconds for one in found]),
            ("inter_token_ms", [gap for one in found for gap in one.gaps]),
        ):
            for percentile in (50, 90, 99):
                value = float(np.percentile(values, percentile)) * 1000
                self._add(row, f"{metric}_p{percentile}", value, "ms", better="lower", n=len(values))

    def _baseline(self, name: str, adapters: int, clients: int) -> None:
        """The same wave as one static batch of transformers, with peft's adapters by name."""
        import torch

        from core.models.adapt import load_adapter, unwrap

        asked, host = self._arguments, self._bench.host
        options: dict[str, Any] = {"max_new_tokens": asked.tokens, "min_new_tokens": asked.tokens, "do_sample": False}
        options |= {"pad_token_id": 0, "eos_token_id": None}
        model: Any = host.model
        for number in range(adapters):
            model = load_adapter(model, self._folder(number), f"a{number}").eval()
        if adapters:
            model.set_adapter("a0")
            options["adapter_names"] = [f"a{number % adapters}" for number in range(clients)]
        speeds = []
        try:
            for _ in range(self._waves + 1):
                ids = torch.tensor(self._bench.prompts(clients, asked.prompt_tokens), device=host.model.device)
                began = time.perf_counter()
                with torch.inference_mode():
                    answers = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).cpu()
                speeds.append((answers.shape[1] - ids.shape[1]) * clients / (time.perf_counter() - began))
        finally:
            if adapters:
                unwrap(host.model)
        self._add_median(name, "baseline_tokens_per_second", speeds[1:], "tokens/s")

    def _add_median(self, case: str, metric: str, values: list[float], unit: str, **options: Any) -> None:
        self._add(case, metric, statistics.median(values), unit, n=len(values), spread=spread_of(values), **options)

    def _add(self, case: str, metric: str, value: float, unit: str, **options: Any) -> None:
        add(self._results, case, metric, value, unit, **options)


def add(results: Results, case: str, metric: str, value: float, unit: str, *, better: Any = "higher", **options: Any) -> None:
    """A row, with its must and aim where it has them."""
    promised, must, aim = TARGETS.get(case, ("", None, None))
    marks: dict[str, Any] = {"must": must, "aim": aim} if promised == metric else {}
    results.add(case, metric, value, unit, better=better, **marks, **options)


def spread_of(values: list[float]) -> float | None:
    """Half the distance of the quartiles."""
    if len(values) < 2:
        return None
    quartiles = statistics.quantiles(values, n=4)
    return (quartiles[2] - quartiles[0]) / 2


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--waves", type=int, default=5, help="waves, or pairs of them, that are measured")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="half of it for N-clients")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer; half of it for N-clients")
    parser.add_argument("--kv-gib", type=float, default=6.0, help="room for keys and values")
    parser.add_argument("--baseline", action="store_true", help="plain transformers and peft beside each wave")
    parser.add_argument("--profile", action="store_true", help="print where the time of a wave's decode steps goes")
    parser.add_argument("--loop", choices=["open", "closed"], help="times to first token and between tokens beside each wave")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second of the open loop")
    parser.add_argument("--requests", type=int, default=256, help="of a loop")
    parser.add_argument("--models", type=Path, help="where model folders are made, or stand already, by shape")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    arguments = parser.parse_args()
    arguments.most_clients = max([RETENTION_CLIENTS, *(_clients(case) for case in arguments.cases.split(","))])
    return arguments


def _clients(case: str) -> int:
    last = case.rsplit("/", 1)[-1]
    return int(last[1:]) if last[:1] == "c" and last[1:].isdigit() else 0


def main() -> None:
    arguments = parsed()
    failed = []
    with tempfile.TemporaryDirectory(prefix="strop-serve-") as temporary:
        work = Path(temporary)
        models = arguments.models.absolute() if arguments.models else work / "models"
        by_model: dict[str, list[str]] = {}
        for case in arguments.cases.split(","):
            by_model.setdefault(case.split("/")[0], []).append(case)
        for model, cases in by_model.items():
            folder = models / MODELS[model]
            results = Results("serve", made(MODELS[model], folder), folder=arguments.out, commit=arguments.commit)
            for case, measure in _measures(results, folder, work / model, arguments, cases):
                try:
                    measure()
                except Exception as error:
                    traceback.print_exc()
                    failed.append(f"{case}: {type(error).__name__}: {error}")
    if failed:
        sys.exit("; ".join(failed))


def _measures(
    results: Results, folder: Path, work: Path, arguments: argparse.Namespace, cases: list[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Those of the engine first, in one; each of the others has the device to itself."""
    of_endpoint = [case for case in cases if case.endswith(("/http", "/ready", "/train-to-serve"))]
    of_engine = [case for case in cases if case not in of_endpoint]
    if of_engine:
        with _opened(Cases(results, folder, work, arguments)) as engine:
            for case in of_engine:
                yield case, lambda case=case: engine.measure(case)  # type: ignore[misc]
    for case in of_endpoint:
        from benchmarks.endpoint import http, ready
        from benchmarks.train_to_serve import train_to_serve

        measure = {"http": http, "ready": ready, "train-to-serve": train_to_serve}[case.split("/", 1)[1]]
        yield case, lambda case=case, measure=measure: measure(results, case, folder, work, arguments)  # type: ignore[misc]


@contextmanager
def _opened(cases: Cases) -> Iterator[Cases]:
    try:
        yield cases
    finally:
        cases.close()


if __name__ == "__main__":
    main()
