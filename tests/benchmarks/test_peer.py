"""What the peer is handed is what strop trains on; the peer itself lives in another environment and isn't run here."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.peer.__main__ import SETTING, compare, hand_over
from benchmarks.quality import EVAL_ROWS, Learned, prepare, run, spec_of
from benchmarks.results import Results
from tests.benchmarks.conftest import ROWS

STEPS = 12


@pytest.fixture(scope="module")
def both(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Learned, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("peer")
    material = prepare(tiny, ROWS, folder / "material", 192)
    spec = spec_of(material, SETTING, {"schedule": {"max_steps": STEPS}})
    hand_over(material, spec, ["matched"], folder / "peer")
    handed = json.loads((folder / "peer" / "handover.json").read_text())
    return run(material, spec, folder / "strop", "cpu"), handed, folder / "peer"


def test_the_peer_gets_strops_rows_in_the_order_of_its_steps(both: tuple[Learned, dict[str, Any], Path]) -> None:
    learned, handed, _ = both
    per_step = handed["micro_batch_size"] * handed["gradient_accumulation_steps"]
    rows = [handed["train"][i : i + per_step] for i in range(0, len(handed["train"]), per_step)]
    assert [sum(len(ids) for ids, _ in step) for step in rows] == [step.tokens for step in learned.steps]
    assert [sum(sum(mask[1:]) for _, mask in step) for step in rows] == [step.trained_tokens for step in learned.steps]
    assert handed["learning_rates"] == pytest.approx([step.learning_rate for step in learned.steps])
    assert len(handed["held_out"]) == EVAL_ROWS
    held = {tuple(ids) for ids, _ in handed["held_out"]}
    assert not any(tuple(ids) in held for ids, _ in handed["train"])


def test_the_peer_gets_an_adapter_that_changes_nothing_yet(both: tuple[Learned, dict[str, Any], Path]) -> None:
    _, _, folder = both
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_A" in name)


def test_a_peer_that_learns_otherwise_shows_in_the_gaps(both: tuple[Learned, dict[str, Any], Path], tmp_path: Path) -> None:
    learned, _, _ = both
    steps = [
        {"step": step.step, "loss": step.loss + 0.25 * (step.step == 7), "grad_norm": step.grad_norm, "learning_rate": 0.1}
        for step in learned.steps
    ]
    peer = {"steps": steps, "seconds": 1.0, "held_out_own": 6.0, "held_out_after": learned.after + 0.03}
    found = {
        "versions": {"trl": "0"},
        "defaults": {},
        "rows": {"rows": 9, "other_ids": 0, "trained_only_by_trl": 9, "trained_only_by_strop": 0},
        "held_out_before": learned.before,
        "cases": {"matched": peer},
    }
    compare(Results("peer", "here", folder=tmp_path, commit="none"), learned, found)
    rows = {(row["case"], row["metric"]): row for row in json.loads((tmp_path / "peer-here.json").read_text())["rows"]}
    assert rows["matched", "eval_loss_gap"]["value"] == pytest.approx(0.03)
    assert rows["matched", "eval_loss_gap"]["must"] == 0.02
    assert rows["matched", "largest_step_loss_gap"]["value"] == pytest.approx(0.25)
    assert rows["matched", "first_step_loss_gap"]["value"] == 0.0
    assert rows["untrained", "eval_loss_gap"]["value"] == 0.0
