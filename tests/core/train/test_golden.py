"""Loss series that must not move by accident.

`python -m tests.core.train.test_golden` writes them anew; the commit says why.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.train.runs import losses, random_rows, run_input, spec_of, train_here, write_cache
from tests.tiny import build_tiny_model

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "train_losses.json"
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 1e-3, "weight_decay": 0.1}},
    "nf4": {"quantization": {"kind": "nf4"}, "memory": {"precision": "fp32"}},
}


def series(case: str, model: Path, cache: Path, run_dir: Path) -> dict[str, list[float]]:
    events = train_here(run_input(model, cache, spec_of(**CASES[case])), run_dir)
    return {
        "loss": losses(events),
        "grad_norm": [event.grad_norm for event in events if event.kind == "step"],
        "eval_loss": [event.eval_loss for event in events if event.kind == "eval"],
    }


@pytest.mark.parametrize("case", CASES)
def test_the_loss_series_is_the_stored_one(case: str, tiny: Path, cache: Path, tmp_path: Path) -> None:
    stored = json.loads(GOLDEN.read_text())[case]
    found = series(case, tiny, cache, tmp_path)
    assert found.keys() == stored.keys()
    for name, values in found.items():
        assert values == pytest.approx(stored[name], abs=1e-4), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        model, cache = build_tiny_model(here / "model"), write_cache(here / "cache", random_rows(40))
        found = {case: series(case, model, cache, here / case) for case in CASES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
