"""Events: what was stored by earlier versions is still read, and curves leave out what a job does not measure."""

from typing import Any

import pytest

from core.events import METRICS, Answer, Answered, Evaluation, metrics_of, parse_child_event, parse_event

AT = {"seq": 3, "at": 1.5}
OLD: dict[str, dict[str, Any]] = {
    "started": {
        "device": "cpu",
        "precision": "fp32",
        "total_steps": 9,
        "first_step": 1,
        "train_rows": 8,
        "eval_rows": 4,
        "trainable_parameters": 1,
        "total_parameters": 2,
        "example": [["a", False], ["b", True]],
    },
    "step": {
        "step": 1,
        "epoch": 0.1,
        "loss": 2.0,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "tokens": 10,
        "trained_tokens": 5,
        "tokens_per_second": 1.0,
        "step_seconds": 1.0,
        "eta_seconds": 1.0,
        "allocated_gib": None,
        "reserved_gib": None,
        "peak_allocated_gib": None,
        "rss_gib": 0.1,
    },
    "eval": {
        "step": 0,
        "eval_loss": 2.0,
        "eval_perplexity": 7.389,
        "eval_trained_tokens": 50,
        "row_losses": [[1.0, 5]],
    },
}
"""As the first version wrote them."""


@pytest.mark.parametrize("kind", OLD)
def test_events_of_the_first_version_are_read(kind: str) -> None:
    event = parse_event(OLD[kind] | AT | {"kind": kind})
    data = event.model_dump(mode="json")
    assert {name: data[name] for name in OLD[kind]} == OLD[kind]
    new = {name: value for name, value in data.items() if name not in {*OLD[kind], *AT, "kind"}}
    assert new in ({"tier": "plain", "tier_reason": ""}, dict.fromkeys(new))  # of all else nothing is claimed
    assert new != {}


def test_curves_leave_out_what_is_not_measured() -> None:
    step = parse_event(OLD["step"] | AT | {"kind": "step"})
    assert not {"reward_accuracy", "reward_margin", "allocated_gib"} & set(metrics_of(step))
    pairs = parse_event(OLD["step"] | AT | {"kind": "step", "reward_accuracy": 0.0, "reward_margin": -1.5})
    assert metrics_of(pairs) == metrics_of(step) | {"reward_accuracy": 0.0, "reward_margin": -1.5}
    preference = Evaluation(step=1, eval_loss=0.7, eval_trained_tokens=5, row_losses=[], eval_reward_accuracy=0.5, eval_bleu=0)
    assert metrics_of(preference) == {
        "eval_loss": 0.7,
        "eval_trained_tokens": 5.0,
        "eval_reward_accuracy": 0.5,
        "eval_bleu": 0.0,
    }


def test_answers_pass_through_the_pipe_and_are_no_curve() -> None:
    answer = Answer(prompt="q\n", text='"a" 今天', reference=None, finish_reason="length")
    event = Answered(seq=2, step=7, source="panel", answers=[answer])
    assert parse_child_event(event.model_dump_json()) == event
    assert parse_event(event.model_dump(mode="json")) == event
    assert metrics_of(event) == {}
    assert "answers" not in METRICS
