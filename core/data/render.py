"""The renderer: a row -> token ids and loss mask. Training, evaluation, preview and serving all call this one.

The text of the whole conversation is made once and encoded in one call, so the ids are those that transformers'
apply_chat_template gives. Where an answer begins is where the text of everything before it, with the generation prompt,
ends: exactly what serving puts before the model. An answer ends with its end-of-turn token, which is trained, so the
model learns to stop; the newline that many templates put behind it is not.

What a user writes never becomes a control token. Each control string inside a content is cut after its first character
by a private mark before rendering, and the text is then encoded in pieces at the marks; rows without any stay in one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from core.data.conversation import Message, PlainText, Preference
from core.data.template import ChatTemplate
from core.data.tokenizer import Tokenizer
from core.errors import BadSpec, InvalidInput, Problem
from core.run import TrainOn

_PRIVATE_USE = range(0xE000, 0xF900)
_PROBE = "\ue0fe"
_SAYABLE = ("<think>", "</think>")


@dataclass(frozen=True)
class Rendered:
    """Token ids and, for each, 1 where it carries loss, else 0."""

    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Marks:
    """What a template writes with one tokenizer.

    `control` finds the strings that content must not turn into tokens (None: there are none). `ends` are the strings
    that end an assistant's turn, `end_ids` their ids; both are empty where the template ends it with ordinary text.
    """

    control: re.Pattern[str] | None
    ends: tuple[str, ...]
    end_ids: tuple[int, ...]


def render(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate, train_on: TrainOn) -> Rendered:
    """Tokens and loss mask of one conversation; what stands behind the last answer teaches nothing and is left out.

    An answer of weight 0 carries no loss, whatever `train_on` says; of the rest, `everything` trains all but the first token.
    Raises InvalidInput: template-error, or template-not-prefix-stable where the template writes the same beginning of a
    conversation in two ways, so that no mask would be right.
    """
    return _render(messages, tokenizer, template, train_on, apart=False)


def render_preference(preference: Preference, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Rendered, Rendered]:
    """(chosen, rejected): the prompt with either answer, whose tokens carry loss. Raises InvalidInput as `render` does.

    Both begin with exactly the ids that serving puts before the model, so that they differ in the answers alone. A template
    that breaks this is refused; where the tokenizer would join the prompt's end and an answer's beginning in one token, the
    two are encoded apart.
    """
    prompt = render_prompt(preference.prompt, tokenizer, template)

    def pair(apart: bool) -> tuple[Rendered, Rendered]:
        conversations = ([*preference.prompt, answer] for answer in (preference.chosen, preference.rejected))
        chosen, rejected = (_render(row, tokenizer, template, "last_turn", apart=apart) for row in conversations)
        return chosen, rejected

    rendered = pair(apart=False)
    if any(sequence.ids[: len(prompt)] != prompt for sequence in rendered):
        rendered = pair(apart=True)
    assert all(sequence.ids[: len(prompt)] == prompt for sequence in rendered)
    return rendered


def render_text(text: PlainText, tokenizer: Tokenizer, max_length: int) -> list[Rendered]:
    """A text as sequences of at most `max_length` tokens, with one BOS where the tokenizer wants one, and an EOS at its end.

    Each sequence begins with the last token of the one before, as context without loss: every token but the first is trained
    exactly once. Strings of special tokens are read as ordinary text.
    """
    ids, _ = tokenizer.encode(text.text, parse_special=False)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        ids.insert(0, tokenizer.bos_id)
    ids += tokenizer.eos_ids[:1]
    begins = range(0, max(1, len(ids) - 1), max_length - 1)
    pieces = [ids[begin : begin + max_length] for begin in begins]
    return [Rendered(piece, [0, *[1] * len(piece)][: len(piece)]) for piece in pieces]


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The ids that serving puts before the model: the conversation and the generation prompt. Raises InvalidInput."""
    cut = _Cut.of(messages, template, marks_of(tokenizer, template))
    text = template.text(cut.messages, tokenizer, add_generation_prompt=True)
    return _encode(text, cut.mark, tokenizer)[0]


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's eos and the template's end of turn."""
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *marks_of(tokenizer, template).end_ids]))


def check_new_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Raise BadSpec with every new token that gets in the way of what template and tokenizer themselves write.

    One that stands there would be taken for a mark, and broken up in contents. One that overlaps the text around a content
    would reach across the border, and swallow the beginning of a mark or join the prompt's end and the answer's beginning.
    """
    before, behind = _written_around_contents(tokenizer, template)
    wrong = []
    for text in (token.text for token in tokenizer.new):
        if any(text in written for written in before | behind):
            wrong.append(f"{text!r} stands in what the chat template writes itself")
        elif any(_overlap(written, text) for written in before) or any(_overlap(text, written) for written in behind):
            wrong.append(f"{text!r} would run into what the chat template writes around a message")
        elif mark := next((mark for mark in tokenizer.special if mark in text or text in mark or _overlap(text, mark)), None):
            wrong.append(f"{text!r} can't be told from the special token {mark!r}")
    if wrong:
        raise BadSpec(f"data.new_tokens: {'; '.join(wrong)}")


def visualize(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """A row as people read it: (text with control tokens, carries loss) pieces in order."""
    pieces = []
    for trained, group in groupby(zip(rendered.ids, rendered.mask, strict=True), key=lambda pair: pair[1]):
        pieces.append((tokenizer.decode([token for token, _ in group], skip_special=False), bool(trained)))
    return pieces


@lru_cache(maxsize=8)
def marks_of(tokenizer: Tokenizer, template: ChatTemplate) -> Marks:
    """Find a template's marks by rendering a probe. Raises InvalidInput when it can't even render that."""
    user, answer = Message("user", "a"), Message("assistant", _PROBE)
    short, long = [user, answer], [user, answer, user]
    texts = [template.text(probe, tokenizer, add_generation_prompt=False) for probe in (short, long)]
    # Some models leave their role marks without the special flag; these are told by standing in a plain conversation.
    # All added tokens would be too many: answers must be able to say <think>.
    structural = {token for token in tokenizer.added if token in texts[1] and token not in _SAYABLE}
    control = sorted((token for token in structural | tokenizer.special.keys() if len(token) > 1), key=len, reverse=True)
    if not control:
        return Marks(None, (), ())
    pattern = re.compile("|".join(map(re.escape, control)))
    ends: dict[str, None] = {}
    for text in texts:
        behind = text.find(_PROBE) + 1
        found = pattern.search(text, behind) if behind else None
        # Behind an answer with another message after it, the next mark may be that message's opening.
        is_next = text is texts[1] and text.startswith(texts[0]) and found is not None and found.start() >= len(texts[0])
        if found and not is_next:
            ends[found[0]] = None
    return Marks(pattern, tuple(ends), tuple(tokenizer.added[end] for end in ends))


def _written_around_contents(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[set[str], set[str]]:
    """(texts that stand before a content, texts that stand behind one): all that the template writes itself."""
    system, user, answer = (Message(role, _PROBE) for role in ("system", "user", "assistant"))
    before: set[str] = set()
    behind: set[str] = set()
    for messages, is_prompt in (([system, user], True), ([user, answer, user], True), ([user, answer], False)):
        try:
            pieces = template.text(messages, tokenizer, add_generation_prompt=is_prompt).split(_PROBE)
        except InvalidInput:  # then so is every row that looks like this
            continue
        before |= set(pieces if is_prompt else pieces[:-1])
        behind |= set(pieces[1:])
    return before, behind


def _overlap(first: str, second: str) -> bool:
    """Whether the end of one text is the beginning of the other."""
    return any(first.endswith(second[:length]) for length in range(1, 1 + min(len(first), len(second))))


def _render(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate, train_on: TrainOn, *, apart: bool
) -> Rendered:
    """`render`; with `apart` no token reaches over the beginning of the last answer."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise InvalidInput("there is no assistant message", [Problem("bad-roles", "there is no assistant message")])
    marks = marks_of(tokenizer, template)
    last = answers[-1]
    cut = _Cut.of(messages[: last + 1], template, marks)
    text = template.text(cut.messages, tokenizer, add_generation_prompt=False)
    # Of everything, the answers without weight have to be found; else those with it.
    sought = 0 if train_on == "everything" else 1
    marked = [index for index in answers if messages[index].weight == sought and (index == last or train_on != "last_turn")]
    spans = {
        index: _answer_span(cut.messages, index, text, tokenizer, template, marks) for index in dict.fromkeys([*marked, last])
    }
    ids, offsets = _encode(text, cut.mark, tokenizer, spans[last].begin if apart else None)
    mask = _mask(offsets, [spans[index] for index in marked])
    if train_on == "everything":
        mask = [1 - is_silent for is_silent in mask]
    if tokenizer.eos_ids and not text.endswith(marks.ends, 0, spans[last].end):
        ids.append(tokenizer.eos_ids[0])
        mask.append(messages[last].weight)
    mask[:1] = [0]  # nothing stands before the first token that it could be predicted from
    return Rendered(ids, mask)


@dataclass(frozen=True)
class _Cut:
    """Messages whose control strings are broken up by `mark`; None where there was nothing to break."""

    messages: list[Message]
    mark: str | None

    @classmethod
    def of(cls, messages: Sequence[Message], template: ChatTemplate, marks: Marks) -> "_Cut":
        control = marks.control
        if control is None or not any(control.search(message.content) for message in messages):
            return cls(list(messages), None)
        taken = {*template.source, *(character for message in messages for character in message.content)}
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in taken), None)
        if mark is None:
            message = "the row holds control strings and every private-use character"
            raise InvalidInput(message, [Problem("control-text", message)])
        return cls([message._replace(content=_break(message.content, control, mark)) for message in messages], mark)


def _break(content: str, control: re.Pattern[str], mark: str) -> str:
    # The search goes on one character later, not behind the match: control strings may overlap.
    pieces, begin = [], 0
    while found := control.search(content, begin):
        pieces.append(content[begin : found.start() + 1])
        begin = found.start() + 1
    return mark.join([*pieces, content[begin:]])


class _Span(NamedTuple):
    begin: int
    end: int


def _answer_span(
    messages: list[Message], index: int, text: str, tokenizer: Tokenizer, template: ChatTemplate, marks: Marks
) -> _Span:
    """Where an answer stands in the text, its end-of-turn mark included."""
    before = template.text(messages[:index], tokenizer, add_generation_prompt=True)
    if not text.startswith(before):
        raise _unstable(index)
    begin = len(before)
    is_last = index == len(messages) - 1
    upto = text if is_last else template.text(messages[: index + 1], tokenizer, add_generation_prompt=False)
    # A template may write an answer otherwise once more messages follow (Qwen3 drops its thoughts); its end is then the
    # next end mark, and without one there is no telling.
    is_stable = text.startswith(upto)
    limit = len(upto) if is_stable else len(text)
    found = [at + len(end) for end in marks.ends if (at := text.find(end, begin, limit)) >= 0]
    if not found and not is_stable:
        raise _unstable(index)
    return _Span(begin, min(found, default=limit))


def _unstable(index: int) -> InvalidInput:
    message = f"the chat template writes the text around message {index + 1} in two ways, so its loss mask is unclear"
    return InvalidInput(message, [Problem("template-not-prefix-stable", message, field=f"messages[{index}]")])


def _encode(
    text: str, mark: str | None, tokenizer: Tokenizer, apart_at: int | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a rendered text, with one BOS where the tokenizer wants one and the template wrote none.

    The text is encoded in pieces, which end at each `mark` and, where it is set, at the place `apart_at`.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    begin = 0
    for whole in [text] if mark is None else text.split(mark):
        at = 0 if apart_at is None else apart_at - begin
        for piece in [whole[:at], whole[at:]] if 0 < at < len(whole) else [whole]:
            piece_ids, piece_offsets = tokenizer.encode(piece, parse_special=True)
            ids += piece_ids
            offsets += [(begin + start, begin + end) for start, end in piece_offsets]
            begin += len(piece)
        begin += 1  # the mark
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
        offsets.insert(0, (0, 0))
    return ids, offsets


def _mask(offsets: list[tuple[int, int]], spans: list[_Span]) -> list[int]:
    """1 for each token that begins inside a span. Spans and offsets are in order, so one pass will do."""
    mask, at = [], 0
    for begin, _ in offsets:
        while at < len(spans) and begin >= spans[at].end:
            at += 1
        mask.append(int(at < len(spans) and spans[at].begin <= begin))
    return mask
