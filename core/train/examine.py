"""An evaluation as the loop does it: held-out loss, answers to held-out prompts with their scores, answers to the panel.

Measures and tells; what follows from it (the best weights, an early end) is `core.train.selection`'s to judge.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from core.data.render import stop_ids
from core.data.template import choose_template
from core.data.tokenizer import Tokenizer
from core.errors import BadData, Diverged
from core.eval.answers import Question, answer_prompts, answers_event, held_out_prompts, panel_questions
from core.eval.evaluate import evaluate
from core.events import Answer, Answered, Evaluation
from core.infer.progress import FinishReason
from core.run import JUDGED_ANSWERS, RunInput
from core.spec import DATA_KINDS
from core.train.contrast import Contrast
from core.train.pairs import PairChunks
from core.train.tier import plain_attention
from core.train.training import Training


@dataclass(frozen=True)
class Examination:
    """What is asked at every evaluation of a run."""

    questions: list[Question]  # of the held-out rows; empty when answers are not scored
    panel: list[Question]
    max_tokens: int
    panel_max_tokens: int
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]


def prepare_examination(training: Training, run: RunInput) -> Examination:
    """Raises BadData when no held-out row holds a prompt and a whole answer, BadSpec for a panel the template refuses."""
    spec = run.spec
    tokenizer = training.tokenizer
    if training.contrast is not None:
        return Examination([], [], 0, 0, tokenizer, ())
    template = choose_template(spec.data.template, tokenizer)
    ends = stop_ids(tokenizer, template)
    questions: list[Question] = []
    if spec.eval.generation is not None:
        questions = held_out_prompts(training.rows.eval_rows, spec.eval.generation.rows, tokenizer, ends)
        if not questions:
            raise BadData("eval.generation: no held-out row holds a prompt and an answer that data.max_length leaves whole")
    return Examination(
        questions=questions,
        panel=panel_questions(spec.eval.panel, tokenizer, None if DATA_KINDS[spec.objective.kind] == "text" else template),
        max_tokens=spec.eval.generation.max_tokens if spec.eval.generation else 0,
        panel_max_tokens=spec.eval.panel_max_tokens,
        tokenizer=tokenizer,
        stop_ids=ends,
    )


def examine(training: Training, asked: Examination, step: int) -> Generator[Evaluation | Answered, None, Evaluation]:
    """Yield an Evaluation and the answers of the model after `step` steps; return the Evaluation. Raises Diverged."""
    if training.contrast is not None:
        evaluation = _examine_pairs(training, training.contrast, step)
        yield evaluation
        return evaluation
    with training.adapters_uncast():
        measured = evaluate(
            training.model,
            training.rows.eval_rows,
            loss=training.loss,
            layout=training.layout,
            device=training.device,
            compute=training.compute,
        )
    if not math.isfinite(measured.loss):
        raise Diverged(f"the held-out loss after step {step} is {measured.loss}")
    held_out = _answers(training, asked, asked.questions, asked.max_tokens)
    curves = {f"eval_{name}": value for name, value in measured.curves.items()}
    if held_out:
        from core.eval.scores import score  # half a second of imports that few runs need

        scores = score([text for text, _ in held_out], [question.reference or "" for question in asked.questions])
        curves |= {"eval_exact_match": scores.exact_match, "eval_bleu": scores.bleu, "eval_rouge_l": scores.rouge_l}
    evaluation = Evaluation(
        step=step,
        eval_loss=measured.loss,
        eval_perplexity=math.exp(min(measured.loss, 700.0)) if training.kind.per_token else None,  # e^710 is no float
        eval_trained_tokens=sum(example.trained_tokens for example in training.rows.eval_rows),
        row_losses=measured.losses,
        **curves,
    )
    yield evaluation
    if held_out:
        yield answers_event(step, "held_out", asked.questions, held_out)
    if asked.panel:
        yield answers_event(step, "panel", asked.panel, _answers(training, asked, asked.panel, asked.panel_max_tokens))
    return evaluation


def _examine_pairs(training: Training, contrast: Contrast, step: int) -> Evaluation:
    pairs = training.rows.eval_rows
    assert isinstance(training.layout, PairChunks)
    with training.adapters_uncast():
        measured = contrast.examine(training.model, pairs, training.layout, compute=training.compute)
    if not math.isfinite(measured["eval_loss"]):
        raise Diverged(f"the held-out loss after step {step} is {measured['eval_loss']}")
    tokens = sum(example.trained_tokens for example in pairs)
    return Evaluation(step=step, eval_trained_tokens=tokens, row_losses=[], **measured)


def write_answers(training: Training, asked: Examination, path: Path) -> None:
    """Have the model as it is now answer the first held-out prompts, and write whole texts, for the judge. Raises Diverged.

    Asked anew, because the weights that are handed over may be those of an evaluation before the resume. Special tokens are
    left out: a judge's server might take them for its own.
    """
    questions = asked.questions[:JUDGED_ANSWERS]
    with path.open("w", encoding="utf-8") as out:
        for question, (text, reason) in zip(questions, _answers(training, asked, questions, asked.max_tokens), strict=True):
            prompt = asked.tokenizer.decode(question.ids, skip_special=True)
            answer = Answer(prompt=prompt, text=text, reference=question.reference, finish_reason=reason)
            out.write(answer.model_dump_json() + "\n")


def _answers(
    training: Training, asked: Examination, questions: list[Question], max_tokens: int
) -> list[tuple[str, FinishReason]]:
    if not questions:
        return []
    with plain_attention(training.model), training.adapters_uncast(), training.compute():
        prompts = [question.ids for question in questions]
        return answer_prompts(training.model, prompts, asked.tokenizer, asked.stop_ids, max_tokens)
