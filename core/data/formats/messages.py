"""OpenAI chat: messages = [{role, content}, ...] with roles system, developer (read as system), user, assistant.

Roles are matched exactly. An answer may have `weight` 0: it is context, and carries no loss. Tool calls and tool messages
are known but not trained on: such a row is refused.
"""

from typing import Any

from core.data.conversation import Draft, Message, Role, json_type, unknown_role
from core.data.formats.format import Format

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = frozenset({"tool", "function"})


def parse(row: dict[str, Any]) -> list[Message]:
    """One row as messages. Raises InvalidInput."""
    draft = Draft()
    add_messages(draft, row["messages"], "messages", read_weights=True)
    return draft.finish("messages")


def add_messages(draft: Draft, messages: Any, where: str, *, read_weights: bool = False) -> None:
    """Take a list of {role, content} that stands at the field path `where`."""
    if not isinstance(messages, list):
        draft.refuse("wrong-type", where, f"expected an array, found {json_type(messages)}")
        messages = []
    for index, message in enumerate(messages):
        at = f"{where}[{index}]"
        if isinstance(message, dict):
            _add(draft, message, at, read_weights)
        else:
            draft.refuse("wrong-type", at, f"expected an object with role and content, found {json_type(message)}")


def _add(draft: Draft, message: dict[str, Any], where: str, read_weights: bool) -> None:
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
        weight = _weight(draft, message, where) if read_weights else 1
        draft.add(_ROLES[role], message["content"], f"{where}.content", weight)


def _weight(draft: Draft, message: dict[str, Any], where: str) -> int:
    weight = message.get("weight")
    if weight is None:
        return 1
    if message["role"] != "assistant":
        draft.refuse("bad-weight", f"{where}.weight", f"only answers have a weight, and this message is the {message['role']}'s")
    elif not isinstance(weight, int) or isinstance(weight, bool) or weight not in (0, 1):
        draft.refuse("bad-weight", f"{where}.weight", "expected 0 (no loss) or 1")
    else:
        return weight
    return 1


FORMAT = Format(
    name="messages",
    kind="conversation",
    required=frozenset({"messages"}),
    optional=frozenset(),
    parse=parse,
    nested={"messages[]": frozenset({"role", "content", "weight"})},
)
