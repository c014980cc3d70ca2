"""LLaMA-Factory's ranking rows in ShareGPT's words: conversations up to the question, chosen and rejected as one turn each."""

from typing import Any

from core.data.conversation import Draft, Preference
from core.data.formats.format import Format
from core.data.formats.sharegpt import TURN_FIELDS, add_conversation, add_turn


def parse(row: dict[str, Any]) -> Preference:
    """One row as a preference. Raises InvalidInput."""
    prompt, chosen, rejected = Draft(), Draft(), Draft()
    add_conversation(prompt, row)
    add_turn(chosen, row["chosen"], "chosen")
    add_turn(rejected, row["rejected"], "rejected")
    return prompt.finish_preference(chosen, rejected, "conversations")


FORMAT = Format(
    name="preference_sharegpt",
    kind="preference",
    required=frozenset({"conversations", "chosen", "rejected"}),
    optional=frozenset({"system"}),
    parse=parse,
    nested={"conversations[]": TURN_FIELDS, "chosen": TURN_FIELDS, "rejected": TURN_FIELDS},
)
