"""The training child as a process: its pipe, its exit codes, its control line, and how it dies."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from core.adapter import ADAPTER_KIND
from core.errors import ArtifactError
from core.manifest import verify_folder
from core.run import CHECKPOINT_KIND, RUN_FILE
from core.states import REASONS, Reason
from tests.core.train.runs import ROOT, Child, losses, run_input, spec_of, train_here

LONG: dict[str, Any] = {"schedule": {"epochs": 12.0}, "checkpoints": {"every_steps": 5}}


def last_good_checkpoint(run_dir: Path) -> Path:
    good = {}
    for folder in (run_dir / "checkpoints").glob("step-*"):
        try:
            good[verify_folder(folder, CHECKPOINT_KIND)["step"]] = folder
        except ArtifactError:
            continue
    return good[max(good)]


@pytest.mark.parametrize("kill", range(20 if os.environ.get("STROP_SOAK") else 1))
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(tiny: Path, cache: Path, tmp_path: Path, kind: str, kill: int) -> None:
    spec = spec_of(tuning={"kind": kind}, optim={"learning_rate": 1e-3}, **LONG)
    whole = losses(train_here(run_input(tiny, cache, spec), tmp_path / "whole"))
    first = Child(run_input(tiny, cache, spec), tmp_path / "first")
    chance = random.Random(f"{kind} {kill}")
    first.until("step", count=chance.randint(6, 40))
    time.sleep(chance.uniform(0, 0.05))  # into a step, or into the writing of a checkpoint (every fifth)
    first.process.kill()
    assert first.finish() == -signal.SIGKILL
    checkpoint = last_good_checkpoint(tmp_path / "first")
    assert not (tmp_path / "first/adapter").exists()

    second = Child(run_input(tiny, cache, spec, checkpoint), tmp_path / "second")
    assert second.finish() == 0, second.log.read_text()
    done = int(checkpoint.name.removeprefix("step-"))
    assert losses(first.events)[:done] == whole[:done]
    assert losses(second.events) == whole[done:]
    assert [event.seq for event in second.events] == list(range(1, len(second.events) + 1))
    assert [event.kind for event in second.events[-3:]] == ["phase", "adapter", "ended"]
    verify_folder(tmp_path / "second/adapter", ADAPTER_KIND)


def test_the_line_stop_leaves_a_checkpoint_and_exits_10(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(schedule={"epochs": 1000.0}, checkpoints={"every_steps": None})
    child = Child(run_input(tiny, cache, spec), tmp_path)
    child.until("step", count=3)
    assert child.process.stdin is not None
    child.process.stdin.write(b"stop\n")
    child.process.stdin.flush()
    assert child.finish() == 10 == REASONS[Reason.DRAINED].exit_code
    checkpoint, ended = child.events[-2:]
    assert (ended.kind, ended.reason) == ("ended", Reason.DRAINED)
    assert checkpoint.kind == "checkpoint"
    assert verify_folder(tmp_path / checkpoint.folder, CHECKPOINT_KIND)["step"] == ended.step >= 3


def test_end_of_file_on_stdin_ends_it(tiny: Path, cache: Path, tmp_path: Path) -> None:
    child = Child(run_input(tiny, cache, spec_of(schedule={"epochs": 1000.0})), tmp_path)
    child.until("step")
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.finish() not in (0, 10)
    assert child.events[-1].kind != "ended"


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_it_dies_with_its_parent_even_when_its_stdin_stays_open(tiny: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(run_input(tiny, cache, spec_of(schedule={"epochs": 1000.0})).model_dump_json())
    events, events_in = os.pipe()
    control_out, control = os.pipe()
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"p = subprocess.Popen([sys.executable, '-m', 'core.train', {str(tmp_path)!r}, '--events-fd', '{events_in}'],"
            f" stdin={control_out}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[{events_in}])\n"
            "print(p.pid, flush=True)\n"
            "time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        pass_fds=[events_in, control_out],
        cwd=ROOT,
    )
    os.close(events_in)
    os.close(control_out)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        assert os.read(events, 1), "the child has begun to speak"
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the child outlived its parent"
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
        if child.is_running():
            child.kill()
        parent.stdout.close()
        os.close(events)
        os.close(control)


def test_divergence_ends_with_its_own_code_and_publishes_nothing(tiny: Path, cache: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    spec = spec_of(data={"datasets": [{"dataset_id": "ds_00000000"}]})
    child = Child(run_input(model, cache, spec), tmp_path / "run")
    assert child.finish() == 14 == REASONS[Reason.NUMERICAL_DIVERGENCE].exit_code
    ended = child.events[-1]
    assert (ended.kind, ended.reason) == ("ended", Reason.NUMERICAL_DIVERGENCE)
    assert "step 1" in ended.message
    assert not (tmp_path / "run/adapter").exists()
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_bug_is_an_internal_error_with_its_traceback_in_the_log(tiny: Path, cache: Path, tmp_path: Path) -> None:
    child = Child(run_input(tmp_path / "nowhere", cache, spec_of()), tmp_path / "run")
    assert child.finish() == 1
    ended = child.events[-1]
    assert (ended.kind, ended.reason) == ("ended", Reason.INTERNAL_ERROR)
    assert "Traceback" in child.log.read_text()
