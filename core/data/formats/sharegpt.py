"""ShareGPT: conversations = [{from, value}, ...]; optionally `system` beside it.

Tags are matched exactly. Turns of tools (function_call, observation, tool) are known but not trained on: such a row is
refused rather than learned without them.
"""

from typing import Any

from core.data.conversation import Draft, Message, Role, json_type, unknown_role
from core.data.formats.format import Format

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TOOL_TAGS = frozenset({"function_call", "observation", "tool", "function", "tool_call", "tool_response"})
TURN_FIELDS = frozenset({"from", "value"})


def parse(row: dict[str, Any]) -> list[Message]:
    """One row as messages. Raises InvalidInput."""
    draft = Draft()
    add_conversation(draft, row)
    return draft.finish("conversations")


def add_conversation(draft: Draft, row: dict[str, Any]) -> None:
    """Take `system` and `conversations`."""
    if row.get("system") not in (None, ""):
        draft.add("system", row["system"], "system")
    turns = row["conversations"]
    if not isinstance(turns, list):
        draft.refuse("wrong-type", "conversations", f"expected an array, found {json_type(turns)}")
        turns = []
    for index, turn in enumerate(turns):
        add_turn(draft, turn, f"conversations[{index}]")


def add_turn(draft: Draft, turn: Any, where: str) -> None:
    """Take one {from, value} that stands at the field path `where`."""
    if not isinstance(turn, dict):
        draft.refuse("wrong-type", where, f"expected an object with from and value, found {json_type(turn)}")
        return
    missing = [name for name in ("from", "value") if name not in turn]
    for name in missing:
        draft.refuse("missing-field", f"{where}.{name}", f"{name} is missing")
    if missing:
        return
    tag = turn["from"]
    role = _ROLES.get(tag) if isinstance(tag, str) else None
    if role is not None:
        draft.add(role, turn["value"], f"{where}.value")
    elif isinstance(tag, str) and tag in _TOOL_TAGS:
        draft.refuse("tools-not-supported", f"{where}.from", f"a turn of a tool ({tag}) can't be trained on yet")
    elif not isinstance(tag, str):
        draft.refuse("wrong-type", f"{where}.from", f"expected text, found {json_type(tag)}")
    else:
        draft.refuse("bad-role", f"{where}.from", unknown_role(tag, tuple(_ROLES)))


FORMAT = Format(
    name="sharegpt",
    kind="conversation",
    required=frozenset({"conversations"}),
    optional=frozenset({"system"}),
    parse=parse,
    nested={"conversations[]": TURN_FIELDS},
)
