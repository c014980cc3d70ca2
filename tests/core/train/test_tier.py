"""The packed tier against the plain one: chosen, proven on the run's own rows, given up when it disagrees, halved if too big."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import BadSpec, CudaOutOfMemory
from core.eval.layout import Padded
from core.models import documents
from core.train import build, loop, tier
from core.train.loop import train
from core.train.training import Training
from tests.core.train.runs import losses, run_input, spec_of, train_here


def packing(choice: str, **batch: Any) -> dict[str, Any]:
    return {"batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "packing": choice, **batch}}


def started(events: list[Any]) -> Any:
    return next(event for event in events if event.kind == "started")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tuning": {"kind": "full"}, "optim": {"learning_rate": 1e-3}},
        {"quantization": {"kind": "nf4"}},
        {"memory": {"precision": "fp32", "checkpointing": True}},
        {"memory": {"precision": "fp32", "checkpointing": True, "checkpointing_every": 2}},
    ],
    ids=["lora", "full", "nf4", "checkpointing", "every-second"],
)
def test_both_tiers_learn_the_same(tiny: Path, cache: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    runs = {
        choice: train_here(run_input(tiny, cache, spec_of(**change, **packing(choice))), tmp_path / choice)
        for choice in ("off", "on")
    }
    assert (started(runs["off"]).tier, started(runs["on"]).tier) == ("plain", "packed")
    assert "gradients" in started(runs["on"]).tier_reason
    assert losses(runs["on"]) == pytest.approx(losses(runs["off"]), abs=5e-5)
    held = [[event.eval_loss for event in events if event.kind == "eval"] for events in runs.values()]
    assert held[0] == pytest.approx(held[1], abs=5e-5)
    tokens = [[(e.tokens, e.trained_tokens) for e in events if e.kind == "step"] for events in runs.values()]
    assert tokens[0] == tokens[1], "packing keeps the user's optimiser batch"


def test_auto_packs_where_the_family_allows_it(tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(train_here(run_input(tiny, cache, spec_of()), tmp_path / "packed")).tier == "packed"
    monkeypatch.setattr(tier, "can_pack", lambda *_: "its attention has a sliding window")
    plain = started(train_here(run_input(tiny, cache, spec_of()), tmp_path / "plain"))
    assert (plain.tier, plain.tier_reason) == ("plain", "its attention has a sliding window")
    with pytest.raises(BadSpec, match="but its attention has a sliding window"):
        train_here(run_input(tiny, cache, spec_of(**packing("on"))), tmp_path / "on")


@pytest.mark.parametrize("fault", ["leak", "no gradient"])
def test_a_packed_tier_that_computes_something_else_is_given_up(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plain = train_here(run_input(tiny, cache, spec_of(**packing("off"))), tmp_path / "plain")
    attend = documents._row_by_row

    def leaky(query: Any, key: Any, value: Any, bounds: list[int], scale: float) -> Any:
        if fault == "leak":
            return attend(query, key, value, [bounds[0], bounds[-1]], scale)
        return attend(query.detach(), key.detach(), value, bounds, scale)

    monkeypatch.setattr(documents, "_row_by_row", leaky)
    events = train_here(run_input(tiny, cache, spec_of()), tmp_path / "run")
    assert started(events).tier == "plain"
    (warning,) = [event for event in events if event.kind == "warning"]
    assert warning.code == "packing_mismatch"
    assert losses(events) == losses(plain), "nothing of the attempt is left in model, adapters or chance"


def test_the_model_that_was_given_up_is_gone_before_the_next_one_is_loaded(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, load = documents._row_by_row, build.load_base
    monkeypatch.setattr(documents, "_row_by_row", lambda q, k, v, bounds, scale: attend(q, k, v, [bounds[0], bounds[-1]], scale))
    loaded: list[Any] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        assert all(model() is None for model in loaded), "two models would have to fit"
        base = load(*arguments, **options)
        loaded.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(build, "load_base", watched)
    assert build.build_training(run_input(tiny, cache, spec_of())).choice.tier == "plain"
    assert len(loaded) == 2


def test_noise_is_what_rounding_does_and_leaves_nothing_behind(tiny: Path, cache: Path) -> None:
    training = build.build_training(run_input(tiny, cache, spec_of(**packing("off"))))
    with torch.no_grad():
        for name, parameter in training.trainable():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    examples = training.rows.step_rows(1)[:4]

    def gradient() -> torch.Tensor:
        found = tier.measure(
            training.model, examples, Padded(4), loss=training.loss, device=training.device, compute=training.compute
        )
        return torch.cat([g.flatten() for g in found.gradients.values()])

    before, chance = gradient(), torch.get_rng_state()
    for dtype, least, most in (("fp32", 1e-8, 1e-5), ("bf16", 1e-4, 5e-2)):
        with tier.rounded_otherwise(training.model, training.device, dtype):
            apart = float((gradient() - before).norm() / before.norm())
        assert least < apart < most
    assert torch.equal(gradient(), before)
    assert torch.equal(torch.get_rng_state(), chance)


@pytest.mark.parametrize(
    ("noise", "apart", "agrees"), [(1e-4, 5e-2, True), (1e-4, 7e-2, False), (4e-2, 0.11, True), (0.9, 0.4, False)]
)
def test_a_noisy_model_is_allowed_its_noise_and_no_more(noise: float, apart: float, agrees: bool) -> None:
    plain, again, packed = (tier.Probe(2.0, {"w": torch.tensor([1.0, off])}) for off in (0.0, noise, apart))
    if agrees:
        tier.assert_agreement(plain, again, packed, "packed", "bf16")
    else:
        with pytest.raises(tier.PackingMismatch, match=f"rounding: {noise:.1e}"):
            tier.assert_agreement(plain, again, packed, "packed", "bf16")


def test_the_probe_recomputes_layers_as_a_step_does_and_drops_nothing(tiny: Path, cache: Path) -> None:
    tuning = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.5}

    def kept_and_found(checkpointing: bool) -> tuple[int, torch.Tensor]:
        memory = {"precision": "fp32", "checkpointing": checkpointing}
        training = build.build_training(run_input(tiny, cache, spec_of(tuning=tuning, memory=memory, **packing("off"))))
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        examples = training.rows.step_rows(1)[:2]
        found = []
        for _ in range(2):
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                probe = tier.measure(
                    training.model, examples, Padded(1), loss=training.loss, device=training.device, compute=training.compute
                )
            found.append(torch.cat([g.flatten() for g in probe.gradients.values()]))
        assert torch.equal(*found), "no chance is in it"
        assert training.model.training
        assert all(module.training for module in training.model.modules())
        return sum(sizes), found[0]

    (kept, whole), (less, recomputed) = kept_and_found(False), kept_and_found(True)
    assert torch.equal(whole, recomputed)
    assert less < 0.8 * kept


def out_of_memory_in(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[str]:
    """Let the n-th training pass over a micro-batch run out of memory where `fails(n)`; returns the layouts as they are tried."""
    tried: list[str] = []
    steps: list[int] = []  # not empty while a step is computed: the probe and evaluations don't count
    loss, accumulate = Training.loss, loop._accumulate

    def guarded(self: Training, model: Any, batch: Any) -> Any:
        found = loss(self, model, batch)
        if steps:
            tried.append(str(self.layout))
            if fails(len(tried)):
                raise torch.OutOfMemoryError("injected")
        return found

    def accumulating(*arguments: Any) -> Any:
        steps.append(1)
        try:
            return accumulate(*arguments)
        finally:
            steps.pop()

    monkeypatch.setattr(Training, "loss", guarded)
    monkeypatch.setattr(loop, "_accumulate", accumulating)
    return tried


@pytest.mark.parametrize("choice", ["off", "on"])
def test_too_little_memory_halves_what_is_in_it_and_nothing_else(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    spec = spec_of(tuning={"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0}, **packing(choice))
    whole = losses(train_here(run_input(tiny, cache, spec), tmp_path / "whole"))
    layouts = out_of_memory_in(monkeypatch, lambda n: n == (4 if choice == "off" else 2))
    events = train_here(run_input(tiny, cache, spec), tmp_path / "halved")
    (warning,) = [event for event in events if event.kind == "warning"]
    assert warning.code == "micro_batch_halved"
    assert "step 2" in warning.message
    assert layouts[0] != layouts[-1]
    assert losses(events) == pytest.approx(whole, abs=2e-5)


def test_a_second_time_ends_the_run_with_the_three_knobs(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_in(monkeypatch, lambda n: n >= 3)
    with pytest.raises(CudaOutOfMemory, match=r"micro_batch_size.*max_length.*checkpointing"):
        list(train(run_input(tiny, cache, spec_of(**packing("off"))), tmp_path, lambda: False))


def test_trap_13_dropout_is_honoured_and_the_same_when_a_step_is_done_again(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step repeated from the same chance, cut as before, is the same step."""
    spec = spec_of(tuning={"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.3}, **packing("off"))
    whole = losses(train_here(run_input(tiny, cache, spec), tmp_path / "whole"))
    without = losses(train_here(run_input(tiny, cache, spec_of(**packing("off"))), tmp_path / "without"))
    assert whole[1:] != without[1:]
    out_of_memory_in(monkeypatch, lambda n: n == 4)
    monkeypatch.setattr("core.eval.layout.Padded.halved", lambda self, examples: self)
    assert losses(train_here(run_input(tiny, cache, spec), tmp_path / "again")) == whole


def test_auto_puts_in_memory_what_the_worker_decided_and_changes_no_step(tiny: Path, cache: Path, tmp_path: Path) -> None:
    batch = {"batch": {"micro_batch_size": "auto", "rows_per_step": 8, "packing": "off"}}
    said = train_here(run_input(tiny, cache, spec_of(**packing("off"))), tmp_path / "said")
    run = run_input(tiny, cache, spec_of(**batch))
    decided = [train_here(run.model_copy(update={"rows_at_once": rows}), tmp_path / str(rows)) for rows in (None, 1, 8)]
    for events in decided:
        assert losses(events) == pytest.approx(losses(said), abs=5e-5)
    layouts = [build.build_training(run.model_copy(update={"rows_at_once": rows})).layout for rows in (None, 1, 8)]
    assert [str(layout) for layout in layouts] == [f"{rows} padded rows at once" for rows in (4, 1, 8)]
