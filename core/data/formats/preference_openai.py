"""OpenAI's preferences: input = {messages}, preferred_output and non_preferred_output = [one message of the assistant]."""

from typing import Any

from core.data.conversation import Draft, Preference, json_type
from core.data.formats.format import Format
from core.data.formats.messages import add_messages

_MESSAGE = frozenset({"role", "content"})


def parse(row: dict[str, Any]) -> Preference:
    """One row as a preference. Raises InvalidInput."""
    prompt, chosen, rejected = Draft(), Draft(), Draft()
    asked = row["input"]
    if not isinstance(asked, dict):
        prompt.refuse("wrong-type", "input", f"expected an object with messages, found {json_type(asked)}")
    elif "messages" not in asked:
        prompt.refuse("missing-field", "input.messages", "messages is missing")
    else:
        add_messages(prompt, asked["messages"], "input.messages")
    add_messages(chosen, row["preferred_output"], "preferred_output")
    add_messages(rejected, row["non_preferred_output"], "non_preferred_output")
    return prompt.finish_preference(chosen, rejected, "input.messages", ("preferred_output", "non_preferred_output"))


FORMAT = Format(
    name="preference_openai",
    kind="preference",
    required=frozenset({"input", "preferred_output", "non_preferred_output"}),
    optional=frozenset(),
    parse=parse,
    nested={
        "input": frozenset({"messages"}),
        "input.messages[]": _MESSAGE,
        "preferred_output[]": _MESSAGE,
        "non_preferred_output[]": _MESSAGE,
    },
)
