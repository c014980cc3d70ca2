"""LLaMA-Factory's ranking rows in Alpaca's words: the question as in `alpaca`, chosen and rejected as texts."""

from typing import Any

from core.data.conversation import Draft, Preference
from core.data.formats.alpaca import add_question
from core.data.formats.format import Format


def parse(row: dict[str, Any]) -> Preference:
    """One row as a preference. Raises InvalidInput."""
    prompt, chosen, rejected = Draft(), Draft(), Draft()
    add_question(prompt, row)
    chosen.add("assistant", row["chosen"], "chosen")
    rejected.add("assistant", row["rejected"], "rejected")
    return prompt.finish_preference(chosen, rejected, "instruction")


FORMAT = Format(
    name="preference_alpaca",
    kind="preference",
    required=frozenset({"instruction", "chosen", "rejected"}),
    optional=frozenset({"input", "system", "history"}),
    parse=parse,
)
