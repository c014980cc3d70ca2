"""A training child that obeys a script instead of training: `python -m tests.worker.fake_child RUN_DIR --events-fd N`.

The script is a JSON list of [verb, arguments...] in the job's metadata, under `attempt-<n>` or `script`.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

from core.adapter import ADAPTER_KIND, AdapterFacts, BaseIdentity
from core.events import (
    AdapterWritten,
    Answer,
    CheckpointWritten,
    Ended,
    PhaseChanged,
    Started,
    Step,
    Warned,
)
from core.manifest import closed_folder
from core.run import ANSWERS_FILE, CHECKPOINT_KIND, read_run_input
from core.states import Phase, Reason


class Child:
    def __init__(self, run_dir: Path, descriptor: int) -> None:
        self.run_dir = run_dir
        self.run = read_run_input(run_dir)
        self._descriptor = descriptor
        self.seq = 0

    def say(self, event) -> None:
        self.seq += 1
        self.raw(event.model_copy(update={"seq": self.seq}).model_dump_json() + "\n")

    def raw(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._descriptor, data) :]

    def is_asked_to_stop(self, seconds: float = 0.0) -> bool:
        ready, _, _ = select.select([0], [], [], seconds)
        if not ready:
            return False
        line = os.read(0, 100)
        if not line:
            os._exit(1)  # the supervisor is gone
        return b"stop" in line

    def train(self, total: int, checkpoint_every: int, pause_seconds: float) -> None:
        """Steps to `total` from where the last checkpoint stands, an adapter in the end; stops when asked."""
        first = 1
        if self.run.resume_from is not None:
            first = json.loads((self.run.resume_from / "state.json").read_text())["step"] + 1
        self.say(_started(total, first))
        self.say(PhaseChanged(phase=Phase.TRAINING))
        for step in range(first, total + 1):
            self.say(_step(step))
            if step % checkpoint_every == 0 and step != total:
                self.checkpoint(step)
            if self.is_asked_to_stop(pause_seconds):
                self.checkpoint(step)
                self.end("drained", step)
        self.adapter(total)
        self.end("finished", total)

    def checkpoint(self, step: int) -> None:
        folder = self.run_dir / "checkpoints" / f"step-{step}"
        if folder.exists():
            return
        with closed_folder(folder, CHECKPOINT_KIND, {"step": step}) as draft:
            (draft / "state.json").write_text(json.dumps({"step": step}))
        self.say(CheckpointWritten(step=step, folder=f"checkpoints/step-{step}"))

    def adapter(self, step: int) -> None:
        facts = AdapterFacts(
            tuning="lora",
            base=BaseIdentity(model=self.run.spec.base_model, weights=self.run.model_weights),
            job_id=self.run.job_id,
            attempt=self.run.attempt,
            step=step,
            rank=8,
            template="t",
            eval_loss=None,
        )
        with closed_folder(self.run_dir / "adapter", ADAPTER_KIND, facts.model_dump(mode="json")) as draft:
            (draft / "weights").write_text(self.run.job_id)
        self.say(AdapterWritten(step=step, folder="adapter"))

    def answers(self, count: int) -> None:
        said = [Answer(prompt=f"What is {n}?", text=f"It is {n}", reference=f"{n}", finish_reason="stop") for n in range(count)]
        (self.run_dir / ANSWERS_FILE).write_text("".join(answer.model_dump_json() + "\n" for answer in said))

    def tear_adapter(self) -> None:
        (self.run_dir / "adapter" / "weights").write_text("rot")

    def end(self, reason: str, step: int = 0, message: str = "said by the child") -> None:
        self.say(Ended(reason=Reason(reason), message=message, step=step))
        sys.exit(Reason(reason).facts.exit_code)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.say(_step(step))

    def warn(self, count: int, message: str = "w") -> None:
        for index in range(count):
            self.say(Warned(code=f"w{index}", message=message))

    def skip(self, count: int) -> None:
        self.seq += count

    def hang(self) -> None:
        while not self.is_asked_to_stop(3600):
            pass

    def ignore_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def ignore_everything(self) -> None:
        """Neither SIGTERM nor `stop` nor the end of stdin."""
        self.ignore_sigterm()
        self.say(Warned(code="deaf", message=str(os.getpid())))
        time.sleep(3600)

    def pid(self) -> None:
        self.say(Warned(code="pid", message=str(os.getpid())))

    def print(self, text: str, times: int = 1) -> None:
        sys.stdout.write((text + "\n") * times)
        sys.stdout.flush()

    def environment(self) -> None:
        self.print(str(dict(os.environ)))

    def fail(self, text: str) -> None:
        raise RuntimeError(text)

    def exit(self, code: int) -> None:
        sys.exit(code)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def _started(total: int, first: int) -> Started:
    return Started(
        device="cpu",
        precision="fp32",
        total_steps=total,
        first_step=first,
        train_rows=8,
        eval_rows=0,
        trainable_parameters=1,
        total_parameters=2,
        example=[("a\0b", True)],
    )


def _step(step: int) -> Step:
    return Step(
        step=step,
        epoch=step / 10,
        loss=1 / step,
        learning_rate=0.1,
        grad_norm=1.0,
        tokens=10,
        trained_tokens=5,
        tokens_per_second=1.0,
        step_seconds=1.0,
        eta_seconds=1.0,
        allocated_gib=None,
        reserved_gib=None,
        peak_allocated_gib=None,
        rss_gib=0.1,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--events-fd", type=int, required=True)
    arguments = parser.parse_args()
    child = Child(arguments.run_dir, arguments.events_fd)
    metadata = child.run.spec.metadata
    for verb, *rest in json.loads(metadata.get(f"attempt-{child.run.attempt}") or metadata["script"]):
        getattr(child, verb)(*rest)


if __name__ == "__main__":
    main()
