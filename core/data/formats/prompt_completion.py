"""prompt and completion, both text: one question, one answer. Both go through the chat template like any other row."""

from typing import Any

from core.data.conversation import Draft, Message
from core.data.formats.format import Format


def parse(row: dict[str, Any]) -> list[Message]:
    """One row as messages. Raises InvalidInput."""
    draft = Draft()
    draft.add("user", row["prompt"], "prompt")
    draft.add("assistant", row["completion"], "completion")
    return draft.finish("completion")


FORMAT = Format(
    name="prompt_completion",
    kind="conversation",
    required=frozenset({"prompt", "completion"}),
    optional=frozenset(),
    parse=parse,
)
