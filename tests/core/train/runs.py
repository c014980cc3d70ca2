"""Run folders, token caches and real children for tests of training, all on the tiny model."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.data.tokens import TokenRow, write_token_cache
from core.events import ChildEvent, parse_child_event
from core.run import RUN_FILE, RunInput, TokenCacheRef
from core.spec import JobSpec
from core.train.loop import train

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 300


def random_rows(count: int, seed: int = 0, longest: int = 24) -> list[tuple[list[int], list[int]]]:
    """(ids, mask): a prompt without loss, then an answer with it; the answer repeats the prompt, so it can be learned."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = rng.integers(3, VOCABULARY, rng.integers(3, longest // 2)).tolist()
        answer = [*prompt[: rng.integers(1, len(prompt) + 1)], 2]
        rows.append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))
    return rows


def write_cache(folder: Path, rows: Sequence[tuple[list[int], list[int]]], group: int = 1) -> Path:
    """`group` rows make one example."""
    numbered = [TokenRow(index // group + 1, ids, mask) for index, (ids, mask) in enumerate(rows)]
    write_token_cache(folder, "ds_00000000", numbered, 512, {}, group=group)
    return folder


def random_pairs(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(chosen, rejected) in turn: one prompt, an answer that repeats it and one that is noise."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for ids, mask in random_rows(count, seed):
        prompt = ids[: mask.index(1)]
        noise = [*rng.integers(3, VOCABULARY, rng.integers(2, 6)).tolist(), 2]
        rows += [(ids, mask), (prompt + noise, [0] * len(prompt) + [1] * len(noise))]
    return rows


def spec_of(**changes: Any) -> JobSpec:
    """A short LoRA job in fp32; `changes` replace top-level fields."""
    fields: dict[str, Any] = {
        "base_model": "test/tiny",
        "data": {"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 4},
        "tuning": {"kind": "lora", "rank": 4, "alpha": 8.0},
        "optim": {"learning_rate": 5e-3},
        "schedule": {"epochs": 2.0, "warmup_steps": 2},
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
        "memory": {"precision": "fp32"},
        "seed": 7,
    }
    return JobSpec.model_validate(fields | changes)


def run_input(model: Path, cache: Path, spec: JobSpec, resume_from: Path | None = None) -> RunInput:
    return RunInput(
        job_id="job_test",
        attempt=1 if resume_from is None else 2,
        spec=spec,
        model_folder=model,
        model_weights="0" * 64,
        token_caches=[TokenCacheRef(dataset_id="ds_00000000", folder=cache, weight=1.0)],
        resume_from=resume_from,
        device="cpu",
    )


def train_here(run: RunInput, run_dir: Path) -> list[ChildEvent]:
    return list(train(run, run_dir, lambda: False))


def losses(events: Sequence[ChildEvent]) -> list[float]:
    return [event.loss for event in events if event.kind == "step"]


class Child:
    """`python -m core.train` as the supervisor starts it."""

    def __init__(self, run: RunInput, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / RUN_FILE).write_text(run.model_dump_json())
        self.log = run_dir / "log"
        reading, writing = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "core.train", str(run_dir), "--events-fd", str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writing],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb", buffering=0)  # what was not asked for yet stays where `select` sees it
        self.events: list[ChildEvent] = []

    def fileno(self) -> int:
        """For `select`: readable when an event, or the end, is there."""
        return self._pipe.fileno()

    def next_event(self) -> ChildEvent | None:
        """Waits for one event; None when the pipe is closed. A torn last line of a killed child is no event."""
        line = self._pipe.readline()
        if not line.endswith(b"\n"):
            return None
        self.events.append(parse_child_event(line))
        return self.events[-1]

    def until(self, kind: str, count: int = 1) -> ChildEvent:
        """Read on to the count-th event of a kind."""
        while (event := self.next_event()) is not None:
            count -= event.kind == kind
            if count == 0:
                return event
        raise AssertionError(f"the child ended without {kind}:\n{self.log.read_text()}")

    def finish(self) -> int:
        """Read everything and return the exit code."""
        while self.next_event() is not None:
            pass
        code = self.process.wait(timeout=60)
        self.close()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        self._pipe.close()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
