"""What the child leaves for the judge: answers of the weights that are handed over, whole, and only where it is asked for."""

from pathlib import Path
from typing import Any

import pytest

from core.adapter import ADAPTER_KIND
from core.data.tokenizer import Tokenizer
from core.events import Answer, ChildEvent
from core.manifest import verify_folder
from core.run import ANSWERS_FILE
from core.train import examine
from tests.core.train.runs import run_input, spec_of, train_here, write_cache

GENERATION = {"rows": 3, "max_tokens": 6}


def spec_for(**eval_fields: Any) -> Any:
    return spec_of(
        optim={"learning_rate": 0.1},  # so high that the answers change
        eval={"every_steps": 1, "generation": GENERATION, "judge": True, **eval_fields},
        checkpoints={"every_steps": 2},
    )


def answers_in(run_dir: Path) -> list[Answer]:
    return [Answer.model_validate_json(line) for line in (run_dir / ANSWERS_FILE).read_text().splitlines()]


def said(events: list[ChildEvent], step: int) -> list[tuple[str, str | None]]:
    [answered] = [event for event in events if event.kind == "answers" and event.step == step]
    return [(answer.text, answer.reference) for answer in answered.answers]


def texts(answers: list[Answer]) -> list[tuple[str, str | None]]:
    return [(answer.text, answer.reference) for answer in answers]


def test_the_answers_are_those_of_the_last_evaluation(tiny: Path, cache: Path, tmp_path: Path) -> None:
    events = train_here(run_input(tiny, cache, spec_for()), tmp_path)
    assert texts(answers_in(tmp_path)) == said(events, 10) != said(events, 0)
    assert len(answers_in(tmp_path)) == 3


def test_the_best_weights_give_the_answers_a_resume_included(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_for(keep_best=True, metric="eval_exact_match")  # nothing ever matches: the first of equals is the best
    events = train_here(run_input(tiny, cache, spec), tmp_path / "whole")
    best = verify_folder(tmp_path / "whole/adapter", ADAPTER_KIND)["step"]
    assert best == 0
    assert texts(answers_in(tmp_path / "whole")) == said(events, best) != said(events, 10)
    train_here(run_input(tiny, cache, spec, tmp_path / "whole/checkpoints/step-8"), tmp_path / "late")
    assert answers_in(tmp_path / "late") == answers_in(tmp_path / "whole")


def test_a_job_that_does_not_ask_leaves_none_and_learns_the_same(tiny: Path, cache: Path, tmp_path: Path) -> None:
    train_here(run_input(tiny, cache, spec_for()), tmp_path / "judged")
    train_here(run_input(tiny, cache, spec_for(judge=False)), tmp_path / "plain")
    assert not (tmp_path / "plain" / ANSWERS_FILE).exists()
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "judged" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


def test_texts_are_whole_without_special_tokens_and_not_too_many(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_folder(tiny)
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    prompt = [end, *([40, 41, 42, 43] * 120)]
    rows = [([*prompt, 50 + n, end], [0] * len(prompt) + [1, 1]) for n in range(8)]
    spec = spec_of(
        data={"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 4},
        schedule={"max_steps": 1},
        eval={"generation": GENERATION, "judge": True},
    )
    monkeypatch.setattr(examine, "JUDGED_ANSWERS", 2)
    (tmp_path / "run").mkdir()
    train_here(run_input(tiny, write_cache(tmp_path / "cache", rows), spec), tmp_path / "run")
    first, second = answers_in(tmp_path / "run")
    assert first.prompt == second.prompt == tokenizer.decode(prompt[1:], skip_special=True)
    assert "<|im_end|>" in tokenizer.decode(prompt, skip_special=False)
