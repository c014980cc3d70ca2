"""CLIP on a GPU: bf16 towers, one gradient whatever the chunks, and memory that goes with the chunk and not with the step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.events import Evaluation, Started, Step
from core.run import RunInput, TokenCacheRef
from core.train.build import build_training
from core.train.training import Training, lay_out
from tests.core.train.pairs import pair_run, pair_spec, prepared, random_pairs
from tests.core.train.runs import train_here
from tests.tiny import build_tiny_clip

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip") / "model", hidden=128, side=64, layers=4)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> TokenCacheRef:
    return prepared(tmp_path_factory.mktemp("pairs") / "work", clip, *random_pairs(300))


def run_of(clip: Path, pairs: TokenCacheRef, **changes: Any) -> RunInput:
    return pair_run(clip, pairs, pair_spec(**changes)).model_copy(update={"device": "cuda"})


def gradients(training: Training) -> tuple[float, dict[str, torch.Tensor]]:
    assert training.contrast is not None
    with training.adapters_uncast():
        loss, _ = training.contrast.backward(
            training.model,
            lay_out(training, 1).batches,
            compute=training.compute,
            backward=training.accelerator.backward,
        )
    return float(loss), {name: parameter.grad.float() for name, parameter in training.trainable() if parameter.grad is not None}


@pytest.mark.parametrize("tuning", [{"kind": "full"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_chunks_change_no_gradient(
    clip: Path, pairs: TokenCacheRef, tuning: dict[str, Any], precision: str, apart: float
) -> None:
    found = {}
    for rows in (256, 32):
        batch = {"micro_batch_size": rows, "rows_per_step": 256}
        changes = {"tuning": tuning, "batch": batch, "memory": {"precision": precision}}
        found[rows] = gradients(build_training(run_of(clip, pairs, **changes)))
    (whole_loss, whole), (cut_loss, cut) = found[256], found[32]
    assert cut_loss == pytest.approx(whole_loss, rel=apart)
    assert whole.keys() == cut.keys()
    # A key's bias has no gradient but rounding, since a softmax does not see it: what is small beside the whole counts little.
    least = 1e-3 * torch.stack([one.norm() for one in whole.values()]).norm()
    worst = {name: float((cut[name] - one).norm() / one.norm().clamp(min=least)) for name, one in whole.items()}
    name = max(worst, key=lambda one: worst[one])
    assert worst[name] <= apart, f"{name}: {worst[name]:.3g} apart; loss {cut_loss:.6g} and {whole_loss:.6g}"


@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "projection"}, LORA], ids=lambda tuning: str(tuning["kind"]))
def test_it_learns_in_bf16_and_its_folder_gives_its_features(
    clip: Path, pairs: TokenCacheRef, tmp_path: Path, tuning: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {
        "tuning": tuning,
        "memory": {"precision": "bf16"},
        "batch": {"micro_batch_size": 64, "rows_per_step": 128},
        "schedule": {"epochs": 10.0, "kind": "constant"},
        "data": {"datasets": [{"dataset_id": pairs.dataset_id}], "eval_rows": 20},
    }
    events = train_here(run_of(clip, pairs, **changes), tmp_path)  # its end reads the folder back
    (started,) = (event for event in events if isinstance(event, Started))
    steps = [event for event in events if isinstance(event, Step)]
    assert started.precision == "bf16"
    assert steps[-1].loss < steps[0].loss
    assert all(isinstance(event.eval_kept_direction, float) for event in events if isinstance(event, Evaluation))


def test_memory_goes_with_the_chunk(clip: Path, pairs: TokenCacheRef) -> None:
    peaks = {}
    for rows in (256, 16):
        training = build_training(run_of(clip, pairs, batch={"micro_batch_size": rows, "rows_per_step": 256}))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(training)
        peaks[rows] = torch.cuda.max_memory_allocated() - before
        del training
        torch.cuda.empty_cache()
    assert peaks[16] < 0.4 * peaks[256], f"bytes at the peak: {peaks}"
