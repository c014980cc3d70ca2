"""The loop in this process: what it says, in which order, and that a resumed run goes on as if nothing had happened."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.adapter import ADAPTER_KIND
from core.errors import ArtifactError, BadData, BadSpec, Diverged, LossIsZero, NoTrainableTokens, RunError
from core.manifest import MANIFEST, verify_folder
from core.run import CHECKPOINT_KIND
from core.train import loop
from core.train.loop import train
from tests.core.train.runs import losses, random_rows, run_input, spec_of, train_here, write_cache

LORA: dict[str, Any] = {"tuning": {"kind": "lora", "rank": 4, "alpha": 8.0}}
DROPOUT: dict[str, Any] = {"tuning": {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.2}}
FULL: dict[str, Any] = {"tuning": {"kind": "full"}}
NF4: dict[str, Any] = {"quantization": {"kind": "nf4"}}
FULL_8BIT: dict[str, Any] = {"tuning": {"kind": "full"}, "optim": {"kind": "paged_adamw_8bit", "learning_rate": 1e-3}}
BF16: dict[str, Any] = {"memory": {"precision": "bf16", "checkpointing": True}}


def test_the_order_of_events(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(eval={"every_steps": 4}, checkpoints={"every_steps": 5})
    events = train_here(run_input(tiny, cache, spec), tmp_path)
    told = [event.phase if event.kind == "phase" else event.kind for event in events]
    step = "step"
    assert told == [
        *("loading", "started", "evaluating", "eval", "training"),
        *(step, step, step, step, "evaluating", "eval", "training"),
        *(step, "checkpoint", step, step, step, "evaluating", "eval", "training"),
        *(step, step, "evaluating", "eval", "checkpoint", "saving", "adapter", "ended"),
    ]
    assert [event.step for event in events if event.kind == "step"] == list(range(1, 11))
    assert [event.step for event in events if event.kind == "eval"] == [0, 4, 8, 10]
    for event in events:
        if event.kind == "checkpoint":
            assert verify_folder(tmp_path / event.folder, CHECKPOINT_KIND)["step"] == event.step
    evaluations = [event for event in events if event.kind == "eval"]
    assert evaluations[-1].eval_loss < evaluations[0].eval_loss
    for event in evaluations:
        assert len(event.row_losses) == 4
        assert sum(count for _, count in event.row_losses) == event.eval_trained_tokens
        assert event.eval_loss == pytest.approx(sum(nats for nats, _ in event.row_losses) / event.eval_trained_tokens)
        assert event.eval_perplexity == pytest.approx(math.exp(event.eval_loss))
    facts = verify_folder(tmp_path / "adapter", ADAPTER_KIND)
    assert facts["eval_loss"] == evaluations[-1].eval_loss
    assert (facts["step"], facts["rank"], facts["tuning"]) == (10, 4, "lora")


def test_trap_11_steps_count_tokens_without_padding_and_started_shows_the_mask(tiny: Path, tmp_path: Path) -> None:
    rows = [([5, 6, 7, 8, 2], [0, 0, 0, 1, 1]), ([9, 10, 2], [0, 1, 1])]
    spec = spec_of(data={"datasets": [{"dataset_id": "ds_00000000"}]}, schedule={"max_steps": 1}, batch={"micro_batch_size": 2})
    events = train_here(run_input(tiny, write_cache(tmp_path / "cache", rows), spec), tmp_path / "run")
    (started,) = [event for event in events if event.kind == "started"]
    assert [trained for _, trained in started.example] == [False, True]
    assert started.example[1][0].endswith("<|im_end|>")
    (step,) = [event for event in events if event.kind == "step"]
    assert (step.tokens, step.trained_tokens, step.epoch) == (8, 4, 1.0)
    assert step.allocated_gib is None
    assert step.rss_gib > 0.01


@pytest.mark.parametrize("change", [LORA, DROPOUT, FULL, NF4, FULL_8BIT, BF16], ids=str)
def test_a_resumed_run_repeats_the_losses_bit_for_bit(tiny: Path, cache: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    spec = spec_of(**change, checkpoints={"every_steps": 3})
    whole = train_here(run_input(tiny, cache, spec), tmp_path / "whole")
    torch.randn(17)  # chance drawn by someone else in between must not matter
    resumed = train_here(run_input(tiny, cache, spec, tmp_path / "whole/checkpoints/step-6"), tmp_path / "resumed")
    assert losses(resumed) == losses(whole)[6:]
    assert [e.grad_norm for e in resumed if e.kind == "step"] == [e.grad_norm for e in whole if e.kind == "step"][6:]
    name = "model.safetensors" if change in (FULL, FULL_8BIT) else "adapter_model.safetensors"
    one, other = (load_file(tmp_path / run / "adapter" / name) for run in ("whole", "resumed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    final = [event.eval_loss for event in whole if event.kind == "eval"][-1]
    assert [event.eval_loss for event in resumed if event.kind == "eval"] == [final]


def test_a_checkpoint_of_the_last_step_needs_only_saving(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(checkpoints={"every_steps": 10})
    whole = train_here(run_input(tiny, cache, spec), tmp_path / "whole")
    resumed = train_here(run_input(tiny, cache, spec, tmp_path / "whole/checkpoints/step-10"), tmp_path / "resumed")
    assert not losses(resumed)
    assert [e.eval_loss for e in resumed if e.kind == "eval"] == [[e.eval_loss for e in whole if e.kind == "eval"][-1]]
    assert resumed[-1].kind == "ended"


def test_a_stop_between_steps_leaves_a_checkpoint(tiny: Path, cache: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    spec = spec_of()
    for event in train(run_input(tiny, cache, spec), tmp_path, lambda: sum(e.kind == "step" for e in seen) == 4):
        seen.append(event)
    assert [event.kind for event in seen[-2:]] == ["checkpoint", "ended"]
    assert (seen[-1].reason, seen[-1].step) == ("drained", 4)
    assert verify_folder(tmp_path / "checkpoints/step-4", CHECKPOINT_KIND)["step"] == 4
    assert not (tmp_path / "adapter").exists()


def test_a_stop_before_the_first_step_has_nothing_to_keep(tiny: Path, cache: Path, tmp_path: Path) -> None:
    events = list(train(run_input(tiny, cache, spec_of()), tmp_path, lambda: True))
    assert (events[-1].kind, events[-1].step) == ("ended", 0)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_another_spec_or_of_other_rows_is_refused(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(checkpoints={"every_steps": 5})
    train_here(run_input(tiny, cache, spec), tmp_path / "one")
    checkpoint = tmp_path / "one/checkpoints/step-5"
    with pytest.raises(ArtifactError, match="another spec"):
        train_here(run_input(tiny, cache, spec_of(seed=8), checkpoint), tmp_path / "two")
    other = write_cache(tmp_path / "other", random_rows(40, seed=1))
    with pytest.raises(ArtifactError, match="other rows"):
        train_here(run_input(tiny, other, spec, checkpoint), tmp_path / "three")


def test_a_field_that_a_later_version_added_makes_no_other_job(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(checkpoints={"every_steps": 3}, schedule={"max_steps": 5})
    series = losses(train_here(run_input(tiny, cache, spec), tmp_path / "whole"))
    folder = tmp_path / "whole" / "checkpoints" / "step-3"
    state = json.loads((folder / "state.json").read_text())
    del state["spec"]["memory"]["fused_layers"]
    (folder / "state.json").write_text(json.dumps(state))
    assert losses(train_here(run_input(tiny, cache, spec, folder), tmp_path / "resumed")) == series[3:]


def test_a_step_is_the_same_in_one_micro_batch_or_eight(tiny: Path, cache: Path, tmp_path: Path) -> None:
    series = {}
    for size, pieces in ((1, 8), (2, 4), (8, 1)):
        spec = spec_of(batch={"micro_batch_size": size, "gradient_accumulation_steps": pieces})
        series[size] = losses(train_here(run_input(tiny, cache, spec), tmp_path / str(size)))
    assert series[1] == pytest.approx(series[8], abs=2e-5)
    assert series[2] == pytest.approx(series[8], abs=2e-5)


def test_trap_9_checkpointing_changes_no_number(tiny: Path, cache: Path, tmp_path: Path) -> None:
    plain = losses(train_here(run_input(tiny, cache, spec_of()), tmp_path / "plain"))
    again = spec_of(memory={"precision": "fp32", "checkpointing": True})
    assert losses(train_here(run_input(tiny, cache, again), tmp_path / "again")) == plain


@pytest.mark.parametrize("eval_rows", [0, 4])
def test_a_loss_that_is_no_number_ends_the_run_with_nothing_left(tiny: Path, cache: Path, tmp_path: Path, eval_rows: int) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = spec_of(data={"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": eval_rows})
    with pytest.raises(Diverged):
        train_here(run_input(tmp_path, cache, spec), tmp_path / "run")
    assert not list(tmp_path.glob("run/**/" + MANIFEST))


def test_all_wrong_target_modules_are_named(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(tuning={"kind": "lora", "target_modules": ["q_proj", "query", "norm"]})
    with pytest.raises(BadSpec, match=r"query \(not there\), norm \(not linear\)"):
        train_here(run_input(tiny, cache, spec), tmp_path)


def test_fp16_needs_a_gpu(tiny: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="fp16 needs a GPU"):
        train_here(run_input(tiny, cache, spec_of(memory={"precision": "fp16"})), tmp_path)


def test_unusable_data_is_told_apart(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(data={"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 40})
    with pytest.raises(BadData, match="eval_rows"):
        train_here(run_input(tiny, cache, spec), tmp_path)
    with pytest.raises(NoTrainableTokens):
        train_here(run_input(tiny, write_cache(tmp_path / "empty", []), spec_of()), tmp_path)


def test_an_adapter_without_a_gradient_is_noticed_at_once(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = loop.build_training

    def with_a_stranger(run: Any) -> Any:
        training = build(run)
        training.model.stranger = torch.nn.Parameter(torch.ones(2))
        return training

    monkeypatch.setattr(loop, "build_training", with_a_stranger)
    with pytest.raises(RunError, match="stranger"):
        train_here(run_input(tiny, cache, spec_of()), tmp_path)


def test_what_a_cpu_does_differently_is_said(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(
        optim={"kind": "paged_adamw_32bit"}, schedule={"max_steps": 5, "warmup_steps": 5}, checkpoints={"every_steps": None}
    )
    events = train_here(run_input(tiny, cache, spec), tmp_path)
    assert [event.code for event in events if event.kind == "warning"] == ["optimizer_not_paged", "warmup_fills_run"]


WATCHED: dict[str, Any] = {
    "every_steps": 2,
    "generation": {"rows": 2, "max_tokens": 3},
    "panel": ["What is 12 and 30?", "Paris"],
    "panel_max_tokens": 3,
}


def test_watching_changes_nothing_of_what_is_learned(tiny: Path, cache: Path, tmp_path: Path) -> None:
    tuning = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.2}
    plain = train_here(run_input(tiny, cache, spec_of(tuning=tuning)), tmp_path / "plain")
    watched = train_here(run_input(tiny, cache, spec_of(tuning=tuning, eval=WATCHED)), tmp_path / "watched")
    assert losses(watched) == losses(plain)
    answered = [(event.step, event.source) for event in watched if event.kind == "answers"]
    assert answered == [(step, source) for step in (0, 2, 4, 6, 8, 10) for source in ("held_out", "panel")]
    for event in watched:
        if event.kind == "eval":
            assert None not in (event.eval_exact_match, event.eval_bleu, event.eval_rouge_l)
        elif event.kind == "answers":
            assert [answer.reference is None for answer in event.answers] == [event.source == "panel"] * 2


def worsening(**eval_fields: Any) -> Any:
    """A rate so high that the best evaluation is an early one."""
    return spec_of(
        optim={"learning_rate": 0.1},
        schedule={"kind": "constant", "epochs": 2.0},
        eval={"every_steps": 1, **eval_fields},
        checkpoints={"every_steps": 2},
    )


def test_the_best_weights_are_handed_over_a_resume_included(tiny: Path, cache: Path, tmp_path: Path) -> None:
    events = train_here(run_input(tiny, cache, worsening(keep_best=True)), tmp_path / "whole")
    held_out = {event.step: event.eval_loss for event in events if event.kind == "eval"}
    best = min(held_out, key=lambda step: held_out[step])
    assert best < 10
    facts = verify_folder(tmp_path / "whole/adapter", ADAPTER_KIND)
    assert (facts["step"], facts["eval_loss"]) == (best, held_out[best])

    upto = spec_of(
        optim={"learning_rate": 0.1}, schedule={"kind": "constant", "max_steps": max(best, 1)}, checkpoints={"every_steps": None}
    )
    if best:
        train_here(run_input(tiny, cache, upto), tmp_path / "upto")
        name = "adapter/adapter_model.safetensors"
        found, expected = load_file(tmp_path / "whole" / name), load_file(tmp_path / "upto" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    late = run_input(tiny, cache, worsening(keep_best=True), tmp_path / "whole/checkpoints/step-8")
    train_here(late, tmp_path / "late")
    assert (tmp_path / "late/adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole/adapter/adapter_model.safetensors"
    ).read_bytes()


def test_training_ends_early_where_an_uninterrupted_run_would(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = worsening(early_stopping={"patience": 3})
    events = train_here(run_input(tiny, cache, spec), tmp_path / "whole")
    ended = events[-1]
    assert ended.kind == "ended"
    assert ended.step < 10
    assert f"stopped early, after step {ended.step}" in ended.message
    last = max(int(folder.name.removeprefix("step-")) for folder in (tmp_path / "whole/checkpoints").iterdir())
    again = train_here(run_input(tiny, cache, spec, tmp_path / f"whole/checkpoints/step-{last}"), tmp_path / "again")
    assert again[-1].step == ended.step
    assert losses(again) == losses(events)[last:]


def test_a_doomed_run_ends_with_its_reason_and_the_last_good_checkpoint(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "core.train.training.Training.loss",
        lambda self, model, batch: type(found := self.kind.function(model, batch, self.objective))(
            found.sums * 0, found.terms, found.curves
        ),
    )
    monkeypatch.setattr(loop, "_assert_trained", lambda training: None)
    spec = spec_of(data={"datasets": [{"dataset_id": "ds_00000000"}]}, checkpoints={"every_steps": 1}, batch={"packing": "off"})
    with pytest.raises(LossIsZero, match=r"steps 1 to 3: the loss was exactly 0.*No checkpoint from before it stands"):
        train_here(run_input(tiny, cache, spec), tmp_path)
