"""OpenAI chat: messages = [{role, content}, ...] with roles system, developer (read as system), user, assistant.

Roles are matched exactly. Tool calls and tool messages are known but not trained on: such a row is refused.
"""

from typing import Any

from core.data.conversation import Draft, Message, Role, json_type, unknown_role
from core.data.formats.format import Format

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = frozenset({"tool", "function"})


def parse(row: dict[str, Any]) -> list[Message]:
    """One row as messages. Raises InvalidInput."""
    draft = Draft()
    messages = row["messages"]
    if not isinstance(messages, list):
        draft.refuse("wrong-type", "messages", f"expected an array, found {json_type(messages)}")
        messages = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            draft.refuse("wrong-type", where, f"expected an object with role and content, found {json_type(message)}")
            continue
        _add(draft, message, where)
    return draft.finish("messages")


def _add(draft: Draft, message: dict[str, Any], where: str) -> None:
    role = message.get("role")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            draft.refuse("tools-not-supported", f"{where}.{name}", "a tool call can't be trained on yet")
            return
    missing = [name for name in ("role", "content") if name not in message]
    for name in missing:
        draft.refuse("missing-field", f"{where}.{name}", f"{name} is missing")
    if missing:
        return
    if not isinstance(role, str):
        draft.refuse("wrong-type", f"{where}.role", f"expected text, found {json_type(role)}")
    elif role in _TOOL_ROLES:
        draft.refuse("tools-not-supported", f"{where}.role", f"a message of a tool ({role}) can't be trained on yet")
    elif role not in _ROLES:
        draft.refuse("bad-role", f"{where}.role", unknown_role(role, tuple(_ROLES)))
    else:
        draft.add(_ROLES[role], message["content"], f"{where}.content")


FORMAT = Format(
    name="messages",
    required=frozenset({"messages"}),
    optional=frozenset(),
    parse=parse,
    items="messages",
    item_fields=frozenset({"role", "content"}),
)
