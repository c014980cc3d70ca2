"""Answers of the model in training: to held-out prompts, for the scores, and to the user's panel, for the eye.

Greedy, one prompt after another, through the code that serves (`core.infer.generate`), on a KV cache: of the logits no more
than the last position's is ever there. Nothing is drawn, so a run's chance, and with it a resume, does not depend on what was
asked. What the answers are worth is computed in `core.eval.scores`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from core.data.conversation import Message, PlainText
from core.data.render import render_prompt, render_text
from core.data.template import ChatTemplate
from core.data.tokenizer import Tokenizer
from core.errors import BadSpec, Diverged, InvalidInput
from core.eval.rows import Example
from core.events import Answer, Answered
from core.infer.generate import generate
from core.infer.progress import End, FinishReason
from core.infer.sampling import GenerationFailed, Sampling

SHOWN_ANSWERS = 16
SHOWN_CHARACTERS = 4000
"""Of a text in an event. A thousand long answers at every evaluation would fill the record with what nobody reads."""

_ELLIPSIS = "…"


@dataclass(frozen=True)
class Question:
    """A prompt as ids and as people read it, and the answer that stands in the data, where there is one."""

    ids: list[int]
    text: str
    reference: str | None = None


def held_out_prompts(examples: Iterable[Example], count: int, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[Question]:
    """Questions of the first `count` examples that have one: what stands before the last trained span asks for that span.

    The token that ends an answer is not part of the reference. Examples are passed over whose last answer is empty, or was cut
    at data.max_length: no answer could match it. Meant for masks over assistant turns; a mask over everything hides where the
    answer begins.
    """
    questions: list[Question] = []
    for example in examples:
        if len(questions) == count:
            break
        ids, mask = example.sequences[0]
        begin, end = _last_span(mask)
        if stop_ids:
            if ids[end - 1] not in stop_ids:
                continue
            end -= 1
        reference = tokenizer.decode(ids[begin:end].tolist(), skip_special=True)
        if begin > 0 and reference.strip():
            prompt: list[int] = ids[:begin].tolist()
            questions.append(Question(prompt, tokenizer.decode(prompt, skip_special=False), reference))
    return questions


def panel_questions(prompts: Sequence[str], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[Question]:
    """The panel as questions: each prompt a user's only message, or, without a template, a text to go on with.

    Raises BadSpec when the template refuses one.
    """
    questions = []
    for number, prompt in enumerate(prompts):
        try:
            questions.append(Question(_panel_ids(prompt, tokenizer, template), prompt))
        except InvalidInput as error:
            raise BadSpec(f"eval.panel[{number}]: {error}") from None
    return questions


def answer_prompts(
    model: Any, prompts: Sequence[list[int]], tokenizer: Tokenizer, stop_ids: Sequence[int], max_tokens: int
) -> list[tuple[str, FinishReason]]:
    """The greedy answer to each prompt (ids, not empty) and why it ended: at one of `stop_ids`, or for its length.

    `model` is a causal LM of transformers, with or without peft, as it is trained; its mode is put back as it was found. What
    a forward pass needs around it (autocast, plain attention) the caller enters, for this call alone: autocast keeps cast
    weights until it is left, and these can't be trained on. An answer ends where the model's positions do, too. Raises
    Diverged when logits are no numbers.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    answers: list[tuple[str, FinishReason]] = []
    was_training = model.training
    model.eval()
    try:
        # Compiled layers would be compiled again for a growing cache; answers are too short to be worth it.
        with torch.compiler.set_stance("force_eager"):
            for number, ids in enumerate(prompts):
                room = max_tokens if positions is None else min(max_tokens, positions - len(ids))
                try:
                    answers.append(_answer(model, ids, Sampling(room), tokenizer, tuple(stop_ids)))
                except GenerationFailed as error:
                    raise Diverged(f"answering prompt {number + 1} of {len(prompts)}: {error}") from error
    finally:
        model.train(was_training)
    return answers


def answers_event(
    step: int,
    source: Literal["panel", "held_out"],
    questions: Sequence[Question],
    answers: Sequence[tuple[str, FinishReason]],
) -> Answered:
    """The first of the answers as an event; long texts lose the beginning of a prompt, the end of an answer."""
    shown = [
        Answer(
            prompt=_ELLIPSIS + question.text[-SHOWN_CHARACTERS:] if len(question.text) > SHOWN_CHARACTERS else question.text,
            text=_cut(text),
            reference=None if question.reference is None else _cut(question.reference),
            finish_reason=finish_reason,
        )
        for question, (text, finish_reason) in zip(questions, answers, strict=True)
    ]
    return Answered(step=step, source=source, answers=shown[:SHOWN_ANSWERS])


def _answer(
    model: Any, ids: list[int], sampling: Sampling, tokenizer: Tokenizer, stop_ids: tuple[int, ...]
) -> tuple[str, FinishReason]:
    pieces: list[str] = []
    for item in generate(model, ids, sampling, tokenizer, stop_ids):
        pieces.append(item.text)
        if isinstance(item, End):
            return "".join(pieces), item.reason
    raise AssertionError("generate ends with an End")


def _last_span(mask: np.ndarray) -> tuple[int, int]:
    """(begin, end) of the last run of trained tokens; every example has one."""
    trained = np.flatnonzero(mask)
    end = int(trained[-1]) + 1
    gaps = np.flatnonzero(mask[:end] == 0)
    return int(gaps[-1]) + 1 if len(gaps) else 0, end


def _panel_ids(prompt: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    if template is not None:
        return render_prompt([Message("user", prompt)], tokenizer, template)
    [whole] = render_text(PlainText(prompt), tokenizer, max_length=1 << 30)
    return whole.ids[:-1] if tokenizer.eos_ids else whole.ids  # as it is trained, but for its end


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + _ELLIPSIS
