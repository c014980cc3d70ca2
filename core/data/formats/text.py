"""Plain text: {"text": "..."}, as TRL's language modelling has it. No template, no roles; every token is learned."""

from typing import Any

from core.data.conversation import PlainText, json_type
from core.data.formats.format import Format
from core.errors import InvalidInput, Problem


def parse(row: dict[str, Any]) -> PlainText:
    """One row as a text. Raises InvalidInput."""
    text = row["text"]
    if not isinstance(text, str):
        problem = Problem("wrong-type", f"expected text, found {json_type(text)}", field="text")
    elif not text.strip():
        problem = Problem("empty-target", "a text without words can't be learned", field="text")
    else:
        return PlainText(text)
    raise InvalidInput("the row can't be used", [problem])


FORMAT = Format(name="text", kind="text", required=frozenset({"text"}), optional=frozenset(), parse=parse)
