"""The best evaluation, early stopping, and the weights of the best; through a checkpoint as well."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ArtifactError
from core.events import Evaluation
from core.spec import EarlyStopping, EvalMetric
from core.train.selection import Best, Selection, Verdict


def evaluation(step: int, eval_loss: float = 1.0, **values: float) -> Evaluation:
    return Evaluation(step=step, eval_loss=eval_loss, eval_trained_tokens=5, row_losses=[], **values)  # type: ignore[arg-type]


def selection(patience: int | None = None, min_delta: float = 0.0, metric: EvalMetric = "eval_loss") -> Selection:
    stopping = None if patience is None else EarlyStopping(patience=patience, min_delta=min_delta)
    return Selection(metric, keep_best=True, early_stopping=stopping)


def verdicts(chosen: Selection, losses: list[float]) -> list[Verdict]:
    return [chosen.judge(10 * number, evaluation(10 * number, loss)) for number, loss in enumerate(losses)]


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def test_a_lower_loss_is_better_and_of_equals_the_first_stays() -> None:
    chosen = selection()
    assert [verdict.is_best for verdict in verdicts(chosen, [2.0, 1.5, 1.5, 1.6, 1.4])] == [True, True, False, False, True]
    assert chosen.best == Best(step=40, value=1.4, eval_loss=1.4)


@pytest.mark.parametrize("metric", ["eval_reward_accuracy", "eval_exact_match", "eval_bleu", "eval_rouge_l"])
def test_of_everything_else_more_is_better(metric: EvalMetric) -> None:
    chosen = selection(patience=2, metric=metric)
    values = [0.0, 0.4, 0.4, 0.6, 0.5, 0.6]
    found = [chosen.judge(n, evaluation(n, eval_loss=n + 1.0, **{metric: value})) for n, value in enumerate(values)]
    assert [verdict.is_best for verdict in found] == [True, True, False, True, False, False]
    assert [verdict.should_stop for verdict in found] == [False] * 5 + [True]
    assert chosen.best == Best(step=3, value=0.6, eval_loss=4.0)


def test_the_model_before_training_may_be_the_best() -> None:
    chosen = selection(patience=2)
    assert verdicts(chosen, [1.0, 1.1, 1.2]) == [Verdict(True, False), Verdict(False, False), Verdict(False, True)]
    assert chosen.best is not None
    assert chosen.best.step == 0


def test_it_stops_after_patience_evaluations_in_a_row_without_progress() -> None:
    losses = [2.0, 1.9, 1.95, 1.92, 1.8, 1.81, 1.8, 1.80001, 1.0]
    stops = [verdict.should_stop for verdict in verdicts(selection(patience=3), losses)]
    assert stops == [False] * 7 + [True, False]
    assert not any(verdict.should_stop for verdict in verdicts(selection(), losses))


def test_progress_smaller_than_min_delta_adds_up() -> None:
    steady = [2.0 - 0.04 * n for n in range(12)]
    assert not any(verdict.should_stop for verdict in verdicts(selection(patience=4, min_delta=0.1), steady))
    slow = selection(patience=2, min_delta=0.1)
    assert [verdict.should_stop for verdict in verdicts(slow, steady[:3])] == [False, False, True]
    assert slow.best == Best(20, steady[2], steady[2])  # the best is the best, however little better
    assert slow.sentence(20) == (
        "Training was stopped early, after step 20: eval_loss got no better in 2 evaluations than 2; "
        "the best was 1.92 after step 20."
    )


def test_a_step_is_judged_once() -> None:
    chosen = selection(patience=2)
    first = verdicts(chosen, [1.0, 2.0])
    assert [chosen.judge(10, evaluation(10, 2.0)) for _ in range(3)] == [first[1]] * 3
    assert not chosen.should_stop


def test_a_metric_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="after step 3 has no eval_bleu"):
        selection(metric="eval_bleu").judge(3, evaluation(3))


def test_a_resumed_run_decides_as_an_uninterrupted_one_would() -> None:
    losses = [2.0, 1.9, 1.85, 1.95, 1.84, 1.9, 1.9, 1.83]
    whole = selection(patience=3, min_delta=0.05)
    expected = verdicts(whole, losses)
    assert any(verdict.should_stop for verdict in expected)
    for interrupted in range(len(losses)):
        first, second = (selection(patience=3, min_delta=0.05) for _ in range(2))
        begun = verdicts(first, losses[:interrupted])
        second.restore(json.loads(json.dumps(first.state())))
        assert (second.best, second.should_stop) == (first.best, first.should_stop)
        rest = [second.judge(10 * n, evaluation(10 * n, losses[n])) for n in range(interrupted, len(losses))]
        assert begun + rest == expected
        assert second.state() == whole.state()


def test_the_best_weights_come_back_bit_for_bit() -> None:
    model, chosen = model_of(0), selection()
    chosen.remember(list(model.named_parameters()))
    kept = chosen.tensors()["weight"]
    before = kept.clone()
    with torch.no_grad():
        model.weight.add_(1)  # the copy is a copy
    assert torch.equal(chosen.tensors()["weight"], before)
    other = model_of(1)
    chosen.put_back(list(other.named_parameters()))
    assert torch.equal(other.weight, before)
    assert other.weight.requires_grad
    chosen.remember(list(model.named_parameters()))
    assert chosen.tensors()["weight"] is kept  # in place: there is never more than one copy
    assert torch.equal(kept, model.weight)


def test_the_best_weights_go_through_a_checkpoint(tmp_path: Path) -> None:
    model, first = model_of(0), selection()
    first.remember(list(model.named_parameters()))
    save_file(first.tensors(), tmp_path / "best.safetensors")
    second, other = selection(), model_of(1)
    second.restore_tensors(load_file(tmp_path / "best.safetensors"))
    second.put_back(list(other.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    second.remember(list(model_of(2).named_parameters()))  # goes on from what was read
    second.put_back(list(other.named_parameters()))
    assert torch.equal(other.weight, model_of(2).weight)


def test_weights_of_other_parameters_are_refused() -> None:
    chosen = selection()
    assert chosen.tensors() == {}
    for names in itertools.product([[], ["weight", "bias"]], [["weight", "odd", "bias"]]):
        held, wanted = ([(name, torch.nn.Parameter(torch.ones(1))) for name in part] for part in names)
        chosen.restore_tensors({})
        chosen.remember(held)
        with pytest.raises(ArtifactError, match=r"best weights: . parameters on one side only"):
            chosen.put_back(wanted)
