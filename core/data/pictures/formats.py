"""The ways to write a row about pictures. A new one is a parser here and a line in `picture_formats`.

Texts and roles follow the rules of text formats; what is added is that every picture named must be there, and that a
conversation has as many IMAGE_MARK as pictures.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from core.data.conversation import IMAGE_MARK, Draft, Message, Parsed, PictureChat, PicturePair, PictureQuestion, json_type
from core.data.formats.format import Format
from core.data.formats.messages import add_messages
from core.data.formats.sharegpt import TURN_FIELDS, add_conversation
from core.data.pictures.names import PictureNames
from core.errors import InvalidInput, Problem

Row = Mapping[str, Any]
_MESSAGE_FIELDS = frozenset({"role", "content", "weight"})


def picture_formats(names: PictureNames) -> dict[str, Format]:
    """The formats of an archive whose pictures are `names`; what asks for more fields stands first."""
    id_alone = frozenset({"id"})

    def pair(name: str, image: str, text: str, optional: frozenset[str] = id_alone) -> Format:
        return Format(name, "picture_pair", frozenset({image, text}), optional, partial(_pair, names, image, text))

    def question(name: str, answer: str) -> Format:
        required = frozenset({"image", "question", answer})
        return Format(name, "picture_question", required, frozenset({"id", "question_id"}), partial(_question, names, answer))

    def chat(name: str, turns: str, nested: frozenset[str], optional: frozenset[str]) -> Format:
        parse: Callable[[dict[str, Any]], Parsed] = partial(_chat, names)
        known = {"image", "images", "id"} | optional
        return Format(name, "picture_chat", frozenset({turns}), frozenset(known), parse, {f"{turns}[]": nested})

    formats = (
        question("vqa_answers", "answers"),
        question("vqa_answer", "answer"),
        chat("llava", "conversations", TURN_FIELDS, frozenset({"system"})),
        chat("messages_images", "messages", _MESSAGE_FIELDS, frozenset()),
        pair("imagefolder", "file_name", "text"),
        pair("open_clip", "filepath", "title"),
        pair("image_captions", "image", "captions"),
        pair("image_caption", "image", "caption", frozenset({"id", "image_id"})),
        pair("image_text", "image", "text"),
    )
    return {known.name: known for known in formats}


def coco_format(names: PictureNames) -> Format:
    """Of the rows that `coco` makes of COCO's lists."""
    return Format(
        "coco_captions",
        "picture_pair",
        frozenset({"file_name", "captions"}),
        frozenset(),
        partial(_pair, names, "file_name", "captions"),
    )


def _pair(names: PictureNames, image: str, text: str, row: Row) -> PicturePair:
    problems: list[Problem] = []
    name = names.find(row[image], image, problems)
    captions = _texts(row[text], text, "a caption", problems)
    return PicturePair(name, captions) if not problems else _refuse(problems)


def _question(names: PictureNames, answer: str, row: Row) -> PictureQuestion:
    """Answers may be objects with `answer` in them, as VQA's are; what else those say is the annotators' affair."""
    problems: list[Problem] = []
    name = names.find(row["image"], "image", problems)
    asked = row["question"]
    if not isinstance(asked, str):
        problems.append(Problem("wrong-type", f"expected text, found {json_type(asked)}", field="question"))
    elif not asked.strip():
        problems.append(Problem("empty-prompt", "a question without text", field="question"))
    given = row[answer]
    if isinstance(given, list):
        given = [item["answer"] if isinstance(item, dict) and "answer" in item else item for item in given]
    answers = _texts(given, answer, "an answer", problems)
    return PictureQuestion(name, asked, answers) if not problems else _refuse(problems)


def _chat(names: PictureNames, row: dict[str, Any]) -> PictureChat:
    """Pictures stand under `image` or `images`, one name or a list of them; a row without any is a plain conversation."""
    draft = Draft()
    if "conversations" in row:
        turns = "conversations"
        add_conversation(draft, row)
    else:
        turns = "messages"
        add_messages(draft, _with_marks(row["messages"]), turns, read_weights=True)
    problems: list[Problem] = []
    given: list[tuple[str, Any]] = []
    for field in ("image", "images"):
        if isinstance(value := row.get(field), list):
            given += [(f"{field}[{index}]", item) for index, item in enumerate(value)]
        elif value not in (None, ""):
            given.append((field, value))
    marks = sum(message.content.count(IMAGE_MARK) for message in draft.messages)
    if draft.is_whole and marks != len(given):
        draft.refuse("image-count", turns, f"{IMAGE_MARK} stands {marks} times and {len(given)} pictures are named")
    for number, message in enumerate(draft.messages, 1):
        if message.role == "assistant" and message.content and not message.content.replace(IMAGE_MARK, "").strip():
            draft.refuse("empty-target", turns, f"message {number} is {IMAGE_MARK} alone, which can't be learned")
    images = [names.find(value, where, problems) for where, value in given]
    for problem in problems:
        draft.refuse(problem.code, problem.field or turns, problem.message)
    messages: list[Message] = draft.finish(turns)
    return PictureChat(images, messages)


def _with_marks(messages: Any) -> Any:
    """Messages whose content is a list of parts, as TRL has them, with the parts written as one text."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": _joined(message["content"])}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _joined(parts: list[Any]) -> Any:
    """The text of parts of the types image and text; the list itself where there is another, for the parser to refuse."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in ("image", "text"):
            return parts
        text = IMAGE_MARK if part["type"] == "image" else part.get("text")
        if not isinstance(text, str):
            return parts
        texts.append(text)
    return "\n".join(texts)


def _texts(given: Any, where: str, what: str, problems: list[Problem]) -> list[str]:
    """One text or a list of them, each with words in it."""
    items = [(f"{where}[{index}]", item) for index, item in enumerate(given)] if isinstance(given, list) else [(where, given)]
    if not items:
        problems.append(Problem("empty-target", f"an empty list; {what} is needed", field=where))
    for at, item in items:
        if not isinstance(item, str):
            problems.append(Problem("wrong-type", f"expected text, found {json_type(item)}", field=at))
        elif not item.strip():
            problems.append(Problem("empty-target", f"{what} without text can't be learned", field=at))
    return [item for _, item in items]


def _refuse(problems: list[Problem]) -> Any:
    raise InvalidInput("the row can't be used", problems)
