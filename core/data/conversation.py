"""What a row is, and the rules of a conversation that can be trained on. Every format ends here; the renderer begins here.

A picture stands in a row as the name of an archive's member; nothing here opens one.

A conversation is: at most one system message, first; then user and assistant in turn, the user first; at least one
assistant message. It may end with a user message, which then teaches nothing. A preference is a conversation up to a user
message, and two answers to that.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from core.data.strict_json import shown
from core.errors import InvalidInput, Problem
from core.spec import DataKind

Role = Literal["system", "user", "assistant"]
MAX_MESSAGES = 1000
"""Rendering is quadratic in the turns of one row, so their number has a bound."""


class Message(NamedTuple):
    role: Role
    content: str
    weight: int = 1
    """0 for an answer that is context only and carries no loss."""


class Preference(NamedTuple):
    """`prompt` ends with a user message; `chosen` and `rejected` are assistant messages, and differ."""

    prompt: list[Message]
    chosen: Message
    rejected: Message


class PlainText(NamedTuple):
    text: str


class PicturePair(NamedTuple):
    """A picture and what may be said of it: at least one caption, none of them empty."""

    image: str
    captions: list[str]


class PictureQuestion(NamedTuple):
    """A question about a picture, and what people answered: at least one answer, maybe the same one several times."""

    image: str
    question: str
    answers: list[str]


class PictureChat(NamedTuple):
    """A conversation in which IMAGE_MARK stands where the pictures go, as often as there are `images`, in their order."""

    images: list[str]
    messages: list[Message]


IMAGE_MARK = "<image>"

Parsed = list[Message] | Preference | PlainText | PicturePair | PictureQuestion | PictureChat
"""A row as its format gives it, one type for each kind of data."""

_KINDS: dict[type, DataKind] = {
    list: "conversation",
    Preference: "preference",
    PlainText: "text",
    PicturePair: "picture_pair",
    PictureQuestion: "picture_question",
    PictureChat: "picture_chat",
}


def kind_of(parsed: Parsed) -> DataKind:
    return _KINDS[type(parsed)]


def images_of(parsed: Parsed) -> list[str]:
    """The pictures that a row names, in its order."""
    if isinstance(parsed, PictureChat):
        return parsed.images
    return [parsed.image] if isinstance(parsed, PicturePair | PictureQuestion) else []


@dataclass
class Draft:
    """Collects the messages of one row and all that is wrong with them; `finish` gives one or raises the other."""

    messages: list[Message] = field(default_factory=list)
    _fields: list[str] = field(default_factory=list)
    _problems: list[Problem] = field(default_factory=list)

    def add(self, role: Role, content: Any, where: str, weight: int = 1) -> None:
        """Take a message whose content stands at the field path `where`."""
        if not isinstance(content, str):
            self.refuse("wrong-type", where, f"expected text, found {json_type(content)}")
            return
        if not content.strip():
            if role == "assistant":
                self.refuse("empty-target", where, "an answer without text can't be learned")
            elif role == "user":
                self.refuse("empty-prompt", where, "a question without text")
        self.messages.append(Message(role, content, weight))
        self._fields.append(where)

    def refuse(self, code: str, where: str, message: str) -> None:
        self._problems.append(Problem(code, message, field=where))

    def finish(self, where: str) -> list[Message]:
        """The conversation. Raises InvalidInput with every problem of the row; `where` is the field of the whole."""
        if self.is_whole:
            self._check_order(where)
        if self._problems:
            raise InvalidInput("the row can't be used", self._problems)
        return self.messages

    def finish_preference(
        self, chosen: "Draft", rejected: "Draft", where: str, fields: tuple[str, str] = ("chosen", "rejected")
    ) -> Preference:
        """The preference of this prompt and two drafts of one answer each, which stand at `fields`. Raises as `finish` does."""
        answers = (chosen, rejected)
        for answer, field_name in zip(answers, fields, strict=True):
            if answer.is_whole and [message.role for message in answer.messages] != ["assistant"]:
                found = "none" if not answer.messages else ", ".join(message.role for message in answer.messages[:5])
                answer.refuse("bad-roles", field_name, f"expected one message of the assistant, found {found}")
        whole = Draft([*self.messages, *chosen.messages], [*self._fields, *chosen._fields])
        if all(part.is_whole for part in (self, *answers)):
            whole._check_order(where)
            if chosen.messages == rejected.messages:
                message = "the same as the chosen answer, so there is nothing to prefer"
                rejected.refuse("equal-preference", fields[1], message)
        problems = [problem for part in (self, *answers, whole) for problem in part._problems]
        if problems:
            raise InvalidInput("the row can't be used", problems)
        return Preference(self.messages, chosen.messages[0], rejected.messages[0])

    def split_last(self) -> "Draft":
        """Take off all messages but the last one, as a draft of their own; what is wrong with them stays here."""
        lead = Draft(self.messages[:-1], self._fields[:-1])
        del self.messages[:-1], self._fields[:-1]
        return lead

    @property
    def is_whole(self) -> bool:
        """No message is missing or out of its place; some may be empty."""
        return all(problem.code in ("empty-target", "empty-prompt") for problem in self._problems)

    def _check_order(self, where: str) -> None:
        if len(self.messages) > MAX_MESSAGES:
            self.refuse("too-many-turns", where, f"{len(self.messages)} messages; {MAX_MESSAGES} are the limit")
            return
        previous: Role | None = None
        for (role, *_), at in zip(self.messages, self._fields, strict=True):
            if role == "system":
                if previous is not None:
                    self.refuse("bad-roles", at, "a system message may only stand first, and once")
            elif role == "assistant" and previous in (None, "system"):
                self.refuse("bad-roles", at, "the conversation begins with the assistant; a user message must come first")
            elif role == previous:
                self.refuse("bad-roles", at, f"two {role} messages in a row; user and assistant must alternate")
            previous = role
        if not any(message.role == "assistant" for message in self.messages):
            self.refuse("bad-roles", where, "there is no assistant message, so nothing to learn")


def json_type(value: Any) -> str:
    """What JSON calls the type of a value, for messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def unknown_role(role: Any, known: tuple[str, ...]) -> str:
    """The sentence for a role that is none; names are matched exactly, so a near miss is pointed out."""
    hint = f"; did you mean {shown(role.lower())}?" if isinstance(role, str) and role.lower() in known else ""
    return f"unknown role {shown(role)}; known: {', '.join(known)}{hint}"
