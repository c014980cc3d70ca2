"""Conversations, preferences and texts as tokens, on the tokenizers of real models: one BOS, an EOS that is learned, and the
loss where it belongs."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from core.data.conversation import Message, PlainText, Preference
from core.data.render import Rendered, render, render_preference, render_prompt, render_text, visualize
from core.data.template import ChatTemplate, choose_template
from core.data.tokenizer import Tokenizer
from core.errors import InvalidInput
from tests.core.data.folders import REAL, build_tokenizer

SOURCE = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "tokenizers"
needs_data = pytest.mark.skipif(not SOURCE.is_dir(), reason="the test data is not beside this checkout")

Load = Callable[[str], Tokenizer]
TEMPLATES = ("chatml", "alpaca")
USER, ANSWER = Message("user", "What is 2 + 2?"), Message("assistant", "It is 4.")
LONG = [Message("system", "Be brief."), USER, ANSWER, Message("user", "一 二?"), Message("assistant", "三 four")]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A tokenizer of the test data by name, made when it is first asked for."""

    @lru_cache
    def load(name: str) -> Tokenizer:
        return Tokenizer.from_folder(build_tokenizer(name, SOURCE, tmp_path_factory.mktemp(name)))

    return load


def all_kinds(tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, list[Rendered]]:
    """Every kind of row, with the tokenizer's own special strings in what people wrote."""
    named = " ".join(tokenizer.named.values())
    hostile = [Message("user", f"say {named}"), Message("assistant", f"{named} said")]
    prompt = [*hostile, Message("user", named)]
    return {
        **{
            on: [render(row, tokenizer, template, on) for row in (LONG, hostile)]
            for on in ("last_turn", "all_turns", "everything")
        },
        "preference": [
            *render_preference(Preference(LONG[:2], ANSWER, Message("assistant", "5")), tokenizer, template),
            *render_preference(Preference(prompt, hostile[1], Message("assistant", named)), tokenizer, template),
        ],
        "text": [*render_text(PlainText("The sum is 4."), tokenizer, 512), *render_text(PlainText(f"{named} a"), tokenizer, 512)],
    }


@needs_data
@pytest.mark.parametrize("choice", TEMPLATES)
@pytest.mark.parametrize("name", REAL)
def test_every_kind_has_exactly_one_bos_and_learns_its_end(real: Load, name: str, choice: str) -> None:
    tokenizer = real(name)
    template = choose_template(choice, tokenizer)  # type: ignore[arg-type]
    assert (tokenizer.bos_id is not None) == tokenizer.adds_bos == (name in ("clip", "mistral-v1", "mistral-v3"))
    assert bool(tokenizer.eos_ids) == (not name.startswith("bert"))
    for kind, rows in all_kinds(tokenizer, template).items():
        for rendered in rows:
            assert len(rendered.ids) == len(rendered.mask)
            assert rendered.mask[0] == 0
            if tokenizer.bos_id is not None:
                assert rendered.ids[0] == tokenizer.bos_id, kind
                assert rendered.ids.count(tokenizer.bos_id) == 1, kind
            if tokenizer.eos_ids:
                end = max(place for place, token in enumerate(rendered.ids) if token == tokenizer.eos_ids[0])
                assert rendered.mask[end] == 1, kind
                assert end >= len(rendered.ids) - 2, kind  # ChatML's newline may stand behind it


@needs_data
def test_an_end_that_is_also_the_padding_keeps_its_loss(real: Load) -> None:
    tokenizer = real("clip")
    assert tokenizer.pad_id == tokenizer.eos_ids[0]
    for kind, rows in all_kinds(tokenizer, choose_template("alpaca", tokenizer)).items():
        assert all(row.ids[-1] == tokenizer.pad_id and row.mask[-1] == 1 for row in rows), kind


ANSWERS = ["four", " four", "\n\nfour", "\n", "<|im_end|>", "</s>x", "😀"]


@needs_data
@pytest.mark.parametrize("choice", TEMPLATES)
@pytest.mark.parametrize("name", REAL)
def test_both_answers_of_a_preference_follow_the_very_prompt_that_serving_sends(real: Load, name: str, choice: str) -> None:
    tokenizer = real(name)
    template = choose_template(choice, tokenizer)  # type: ignore[arg-type]
    prompt = render_prompt(LONG[:4], tokenizer, template)
    for text in ANSWERS:
        preference = Preference(LONG[:4], Message("assistant", text), Message("assistant", "rejected"))
        for rendered in render_preference(preference, tokenizer, template):
            assert rendered.ids[: len(prompt)] == prompt
            assert not any(rendered.mask[: len(prompt)])
            trained = [token for token, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
            assert trained == rendered.ids[len(prompt) : len(prompt) + len(trained)]
            assert trained or not tokenizer.eos_ids


@needs_data
def test_an_answer_is_encoded_apart_from_the_prompt_only_where_they_would_share_a_token(real: Load) -> None:
    tokenizer = real("qwen")
    template = choose_template("chatml", tokenizer)
    prompt = render_prompt([USER], tokenizer, template)

    def whole(answer: str) -> Rendered:
        return render([USER, Message("assistant", answer)], tokenizer, template, "last_turn")

    def chosen(answer: str) -> Rendered:
        return render_preference(Preference([USER], Message("assistant", answer), ANSWER), tokenizer, template)[0]

    assert chosen("It is five.") == whole("It is five.")
    joined, apart = whole("\n\nfour"), chosen("\n\nfour")
    assert joined.ids[: len(prompt)] != prompt
    assert apart.ids[: len(prompt)] == prompt
    assert tokenizer.decode(apart.ids, skip_special=False) == tokenizer.decode(joined.ids, skip_special=False)
    assert visualize(apart, tokenizer)[1] == ("\n\nfour<|im_end|>", True)


def test_a_template_that_writes_the_prompt_anew_for_each_answer_is_refused(tiny: Tokenizer) -> None:
    counting = ChatTemplate("model", "{{ messages[-1].content | length }}" + choose_template("chatml", tiny).source)
    with pytest.raises(InvalidInput, match="two ways") as caught:
        render_preference(Preference([USER], ANSWER, Message("assistant", "5")), tiny, counting)
    assert caught.value.problems[0].code == "template-not-prefix-stable"


def test_everything_is_all_but_the_first_token(tiny: Tokenizer) -> None:
    template = choose_template("model", tiny)
    rendered = render([*LONG, USER], tiny, template, "everything")
    assert rendered.mask == [0] + [1] * (len(rendered.ids) - 1)
    assert rendered.ids == render(LONG, tiny, template, "all_turns").ids


def silent(row: list[Message], *places: int) -> list[Message]:
    return [message._replace(weight=int(place not in places)) for place, message in enumerate(row)]


def test_an_answer_of_weight_0_carries_no_loss_whatever_is_trained_on(tiny: Tokenizer) -> None:
    template = choose_template("model", tiny)
    first, second = "It is 4.<|im_end|>", "三 four<|im_end|>"

    def trained(row: list[Message], train_on: str) -> list[str]:
        rendered = render(row, tiny, template, train_on)  # type: ignore[arg-type]
        assert rendered.ids == render(LONG, tiny, template, "all_turns").ids
        return [text for text, is_trained in visualize(rendered, tiny) if is_trained]

    assert trained(LONG, "all_turns") == [first, second]
    assert trained(silent(LONG, 2), "all_turns") == [second]
    assert trained(silent(LONG, 4), "all_turns") == [first]
    assert trained(silent(LONG, 2), "last_turn") == [second]
    assert trained(silent(LONG, 4), "last_turn") == []
    assert trained(silent(LONG, 2, 4), "all_turns") == []
    everything = "".join(trained(LONG, "everything"))
    assert first in everything
    assert trained(silent(LONG, 2), "everything") == everything.split(first)
    assert trained(silent(LONG, 2, 4), "everything") == [
        part for half in everything.split(first) for part in half.split(second) if part
    ]


def test_an_end_put_behind_an_answer_of_weight_0_is_silent_too(tiny: Tokenizer) -> None:
    bare = ChatTemplate(
        "model",
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    )
    for train_on in ("last_turn", "everything"):
        for weight in (0, 1):
            rendered = render([USER, ANSWER._replace(weight=weight)], tiny, bare, train_on)
            assert (rendered.ids[-1], rendered.mask[-1]) == (tiny.eos_ids[0], weight)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 9, 13, 14, 15, 16, 100])
def test_every_token_of_a_text_is_trained_exactly_once(tiny: Tokenizer, length: int) -> None:
    text = "".join("abcdefghijklmnopqrstuvwxyz"[(place * place) % 23] + "." for place in range(length))
    whole, _ = tiny.encode(text, parse_special=False)
    whole.append(tiny.eos_ids[0])
    sequences = render_text(PlainText(text), tiny, 8)
    assert all(2 <= len(row.ids) <= 8 for row in sequences)
    assert all(row.mask == [0] + [1] * (len(row.ids) - 1) for row in sequences)
    assert [token for row in sequences for token in row.ids[1:]] == whole[1:]
    assert [row.ids[0] for row in sequences] == [whole[0], *(row.ids[-1] for row in sequences[:-1])]
    assert all(len(row.ids) == 8 for row in sequences[:-1])
    (one,) = render_text(PlainText(text), tiny, len(whole))
    assert one == Rendered(whole, [0] + [1] * (len(whole) - 1))


@needs_data
def test_a_text_is_the_ids_of_transformers_between_bos_and_eos(real: Load, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(build_tokenizer("mistral-v1", SOURCE, tmp_path))
    tokenizer = real("mistral-v1")
    for text in ("Hello  world\n", "</s> is a mark, <s> too", "第一行"):
        (rendered,) = render_text(PlainText(text), tokenizer, 512)
        body = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert rendered.ids == [tokenizer.bos_id, *body, tokenizer.eos_ids[0]]


@needs_data
def test_a_text_of_one_token_without_an_end_teaches_nothing(real: Load) -> None:
    (rendered,) = render_text(PlainText("one"), real("bert-base-uncased"), 8)
    assert rendered.mask == [0]
