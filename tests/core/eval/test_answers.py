"""Answers of a model in training: which prompts, the same text as transformers' own, and no trace left in the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from core.data.conversation import Message
from core.data.render import render, render_prompt, stop_ids
from core.data.template import ChatTemplate, choose_template
from core.data.tokenizer import Tokenizer
from core.errors import BadSpec, Diverged
from core.eval.answers import (
    SHOWN_ANSWERS,
    SHOWN_CHARACTERS,
    Question,
    answer_prompts,
    answers_event,
    held_out_prompts,
    panel_questions,
)
from core.eval.rows import Example
from core.events import parse_child_event
from core.models.load import load_base
from tests.lora import add_lora, fresh_answer

TALK = [
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris."),
    Message("user", "And of Spain?"),
    Message("assistant", "It is\n\nMadrid "),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_model)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return choose_template("model", tokenizer)


@pytest.fixture(scope="module")
def ends(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    return stop_ids(tokenizer, template)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def adapted(tiny_model: Path, model: Any, tmp_path: Path) -> Any:
    """An adapter in training that answers otherwise than its base."""
    return PeftModel.from_pretrained(model, str(add_lora(tiny_model, tmp_path / "lora", 1)), is_trainable=True)


def in_training(folder: Path, tuning: str) -> Any:
    quantization: Any = tuning if tuning in ("nf4", "int8") else "none"
    model = load_base(
        folder, name="tiny", weights="0" * 64, quantization=quantization, precision="fp32", device=torch.device("cpu")
    ).model
    torch.manual_seed(0)
    if tuning == "full":
        model.requires_grad_(True)
    else:
        targets = ["q_proj", "o_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.2, target_modules=targets, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def example_of(
    messages: list[Message], tokenizer: Tokenizer, template: ChatTemplate, train_on: Any = "all_turns", length: int = 512
) -> Example:
    rendered = render(messages, tokenizer, template, train_on)
    return Example(((np.array(rendered.ids[:length], np.int32), np.array(rendered.mask[:length], np.uint8)),))


def prompts_of(tokenizer: Tokenizer, template: ChatTemplate) -> list[list[int]]:
    texts = ("What is the capital of France?", "Add 12 and 30", "Write a poem")
    return [render_prompt([Message("user", text)], tokenizer, template) for text in texts]


def expected(model: Any, prompts: list[list[int]], tokenizer: Tokenizer, ends: tuple[int, ...], count: int) -> list[Any]:
    """What transformers' own `generate` answers."""
    was_training = model.training
    model.eval()
    found = []
    for prompt in prompts:
        ids, _ = fresh_answer(model, prompt, count)
        stopped = ids[-1] in ends
        found.append((tokenizer.decode(ids, skip_special=True), "stop" if stopped else "length"))
    model.train(was_training)
    return found


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
@pytest.mark.parametrize("choice", ["model", "alpaca"])
def test_the_question_is_what_serving_would_put_before_the_last_answer(tokenizer: Tokenizer, choice: Any, train_on: Any) -> None:
    template = choose_template(choice, tokenizer)
    example = example_of(TALK, tokenizer, template, train_on)
    [question] = held_out_prompts([example], 1, tokenizer, stop_ids(tokenizer, template))
    assert question.ids == render_prompt(TALK[:-1], tokenizer, template)
    assert question.text == tokenizer.decode(question.ids, skip_special=False)
    assert question.reference == TALK[-1].content


def test_an_answer_that_carries_no_loss_is_not_asked_for(tokenizer: Tokenizer, template: ChatTemplate, ends: Any) -> None:
    talk = [*TALK[:3], Message("assistant", "Madrid", 0)]
    [question] = held_out_prompts([example_of(talk, tokenizer, template)], 1, tokenizer, ends)
    assert (question.ids, question.reference) == (render_prompt(TALK[:1], tokenizer, template), "Paris.")


def test_an_end_without_the_special_flag_is_no_part_of_the_reference(tokenizer: Tokenizer) -> None:
    """Some models' end-of-turn token is an ordinary one, which decoding would show."""
    [prompt, answer, end] = [tokenizer.encode(text, parse_special=False)[0] for text in ("the dog", "the fox", "!")]
    ids = np.array([*prompt, *answer, *end], np.int32)
    mask = np.array([0] * len(prompt) + [1] * (len(answer) + 1), np.uint8)
    [question] = held_out_prompts([Example(((ids, mask),))], 1, tokenizer, tuple(end))
    assert (question.ids, question.text, question.reference) == (prompt, "the dog", "the fox")


def test_questions_are_the_first_that_can_be_answered(tokenizer: Tokenizer, template: ChatTemplate, ends: Any) -> None:
    def asked(text: str, answer: str, length: int = 512) -> Example:
        return example_of([Message("user", text), Message("assistant", answer)], tokenizer, template, length=length)

    cut = asked("one", "a long answer that does not fit", length=20)
    assert cut.trained_tokens > 0
    blank = asked("two", " \n")
    good = [asked(name, f"answer {name}") for name in ("three", "four", "five")]
    examples = [cut, good[0], blank, good[1], good[2]]
    questions = held_out_prompts(examples, 2, tokenizer, ends)
    assert [question.reference for question in questions] == ["answer three", "answer four"]
    assert held_out_prompts(iter(examples), 2, tokenizer, ends) == questions
    assert len(held_out_prompts(examples, 100, tokenizer, ends)) == 3
    # A tokenizer that knows no end leaves no way to tell what was cut.
    assert len(held_out_prompts(examples, 100, tokenizer, ())) == 4


def test_the_panel_is_asked_as_a_user_or_read_as_a_text(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    text = "The quick <|im_end|>"
    [as_user] = panel_questions([text], tokenizer, template)
    assert as_user == Question(render_prompt([Message("user", text)], tokenizer, template), text)
    [as_text] = panel_questions([text], tokenizer, None)
    assert (as_text.text, as_text.reference) == (text, None)
    assert tokenizer.decode(as_text.ids, skip_special=False) == text
    assert not set(as_text.ids) & set(tokenizer.eos_ids)


def test_a_template_that_refuses_a_panel_prompt_names_it(tokenizer: Tokenizer) -> None:
    source = "{% if 'rude' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}"
    with pytest.raises(BadSpec, match=r"eval\.panel\[1\]: .*no"):
        panel_questions(["kind", "rude"], tokenizer, ChatTemplate("picky", source))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_answers_are_transformers_own(
    adapted: Any, tokenizer: Tokenizer, template: ChatTemplate, ends: Any, checkpointing: bool
) -> None:
    prompts = prompts_of(tokenizer, template)
    wanted = expected(adapted, prompts, tokenizer, ends, 24)
    with adapted.disable_adapter():
        assert expected(adapted, prompts, tokenizer, ends, 24) != wanted
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    kept: list[int] = []
    watch = adapted.get_base_model().register_forward_hook(lambda _, __, output: kept.append(output.logits.shape[1]))
    chance = torch.get_rng_state()
    assert answer_prompts(adapted, prompts, tokenizer, ends, 24) == wanted
    watch.remove()
    assert set(kept) == {1}  # logits of one position at a time
    assert adapted.training
    assert torch.equal(torch.get_rng_state(), chance)
    adapted.eval()
    answer_prompts(adapted, prompts[:1], tokenizer, ends, 1)
    assert not adapted.training


def test_an_answer_ends_at_a_stop_id(adapted: Any, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    prompts = prompts_of(tokenizer, template)[:1]
    adapted.eval()
    ids, _ = fresh_answer(adapted, prompts[0], 8)
    stop = next(token for place, token in enumerate(ids) if place > 0 and token not in ids[:place])
    kept = ids[: ids.index(stop)]
    assert answer_prompts(adapted, prompts, tokenizer, (stop,), 8) == [(tokenizer.decode(kept, skip_special=True), "stop")]


def test_an_answer_ends_where_the_positions_do(model: Any, tokenizer: Tokenizer, ends: Any) -> None:
    model.config.max_position_embeddings = 20
    seen: list[int] = []
    watch = model.register_forward_hook(lambda _, __, kwargs, ___: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    answers = answer_prompts(model, [[5] * 17, [5] * 20, [5] * 30], tokenizer, (), 64)
    watch.remove()
    assert [reason for _, reason in answers] == ["length"] * 3
    assert seen == [17, 1, 1]  # three tokens for the first, not one pass for the others
    assert [text for text, _ in answers[1:]] == ["", ""]


@pytest.mark.parametrize("tuning", ["full", "lora", "nf4", "int8"])
def test_training_goes_on_as_if_nothing_had_been_asked(
    tiny_model: Path, tokenizer: Tokenizer, template: ChatTemplate, ends: Any, tuning: Any
) -> None:
    """Under autocast, with checkpointing: no cast weight, inference tensor, mode or random draw of the answers is left."""
    prompts = prompts_of(tokenizer, template)
    ids = torch.tensor([example_of(TALK, tokenizer, template).sequences[0][0].tolist()])

    def numbers(asks: bool) -> list[tuple[float, float]]:
        subject = in_training(tiny_model, tuning)
        optimizer = torch.optim.AdamW([p for p in subject.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(3):
            if asks:
                with torch.autocast("cpu", torch.bfloat16):
                    assert len(answer_prompts(subject, prompts, tokenizer, ends, 4)) == 3
            with torch.autocast("cpu", torch.bfloat16):
                loss = subject(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(subject.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append((loss.item(), norm.item()))
        return found

    quiet = numbers(asks=False)
    assert quiet[-1][0] < quiet[0][0]
    assert numbers(asks=True) == quiet


def test_layers_are_not_compiled_for_answers(model: Any, tokenizer: Tokenizer, template: ChatTemplate, ends: Any) -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        compiled.append(1)
        forward: Callable[..., Any] = graph.forward
        return forward

    prompts = prompts_of(tokenizer, template)
    wanted = answer_prompts(model, prompts, tokenizer, ends, 6)
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend)
    assert answer_prompts(model, prompts, tokenizer, ends, 6) == wanted
    assert compiled == []
    with torch.no_grad():
        model(input_ids=torch.tensor([prompts[0]]), use_cache=False)
    assert compiled != []  # but they are for all else


def test_logits_that_are_no_numbers_end_the_run(model: Any, tokenizer: Tokenizer, ends: Any) -> None:
    model.train()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # apart from the embeddings
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(Diverged, match=r"prompt 2 of 2: .*not finite"):
        answer_prompts(model, [[5, 6], [5, 7]], tokenizer, ends, 4)
    assert model.training


def test_an_event_shows_the_first_answers_and_no_endless_text() -> None:
    long = "x" * SHOWN_CHARACTERS
    questions = [Question([1], f"old{long}", f"{long}end")] + [Question([1], f"prompt {n}") for n in range(SHOWN_ANSWERS)]
    event = answers_event(7, "held_out", questions, [(f"{long}tail", "length")] + [("fine", "stop")] * SHOWN_ANSWERS)
    assert (event.kind, event.step, event.source, len(event.answers)) == ("answers", 7, "held_out", SHOWN_ANSWERS)
    first, second = event.answers[:2]
    assert (first.prompt, first.text, first.reference) == (f"…{long}", f"{long}…", f"{long}…")
    assert (first.finish_reason, second.finish_reason) == ("length", "stop")
    assert (second.prompt, second.text, second.reference) == ("prompt 0", "fine", None)
    assert parse_child_event(event.model_dump_json()) == event
