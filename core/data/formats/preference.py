"""TRL's preferences: prompt, chosen, rejected, each a text or a list of messages as in `messages`.

The answers' lists may begin with the prompt, repeated in both; without a `prompt` beside them they have to.
"""

from typing import Any

from core.data.conversation import Draft, Preference, Role
from core.data.formats.format import Format
from core.data.formats.messages import add_messages

_MESSAGE = frozenset({"role", "content"})


def parse(row: dict[str, Any]) -> Preference:
    """One row as a preference. Raises InvalidInput."""
    prompt = _draft(row, "prompt", "user") if "prompt" in row else Draft()
    chosen, rejected = _draft(row, "chosen", "assistant"), _draft(row, "rejected", "assistant")
    lead, other = chosen.split_last(), rejected.split_last()
    if prompt.is_whole and chosen.is_whole and rejected.is_whole:
        if lead.messages != other.messages:
            rejected.refuse("prompts-differ", "rejected", "chosen and rejected must answer the same messages")
        elif lead.messages and "prompt" not in row:
            prompt = lead
        elif lead.messages and lead.messages != prompt.messages:
            prompt.refuse("prompts-differ", "prompt", "chosen and rejected begin with other messages than the prompt's")
    return prompt.finish_preference(chosen, rejected, "prompt" if "prompt" in row else "chosen")


def _draft(row: dict[str, Any], name: str, role: Role) -> Draft:
    draft = Draft()
    if isinstance(row[name], list):
        add_messages(draft, row[name], name)
    else:
        draft.add(role, row[name], name)
    return draft


_NESTED = {"prompt[]": _MESSAGE, "chosen[]": _MESSAGE, "rejected[]": _MESSAGE}
FORMAT = Format(
    name="preference",
    kind="preference",
    required=frozenset({"prompt", "chosen", "rejected"}),
    optional=frozenset(),
    parse=parse,
    nested=_NESTED,
)
IMPLICIT = Format(
    name="preference_implicit",
    kind="preference",
    required=frozenset({"chosen", "rejected"}),
    optional=frozenset(),
    parse=parse,
    nested=_NESTED,
)
