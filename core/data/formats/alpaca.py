"""Alpaca: instruction, input, output; optionally `system` and `history` ([[user, assistant], ...], oldest first).

`input` is joined to the instruction by a blank line and the two make one user message, so every chat template can take
it. The alpaca template therefore has no section of its own for the input.
"""

from typing import Any

from core.data.conversation import Draft, Message, json_type
from core.data.formats.format import Format


def parse(row: dict[str, Any]) -> list[Message]:
    """One row as messages. Raises InvalidInput."""
    draft = Draft()
    add_question(draft, row)
    draft.add("assistant", row["output"], "output")
    return draft.finish("output")


def add_question(draft: Draft, row: dict[str, Any]) -> None:
    """Take all that stands before the answer: `system`, `history`, `instruction` and `input`."""
    if row.get("system") not in (None, ""):
        draft.add("system", row["system"], "system")
    history = row.get("history") or []
    if not isinstance(history, list):
        draft.refuse("wrong-type", "history", f"expected an array of pairs, found {json_type(history)}")
        history = []
    for index, pair in enumerate(history):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            draft.refuse("wrong-type", where, "expected a pair [user, assistant]")
            continue
        draft.add("user", pair[0], f"{where}[0]")
        draft.add("assistant", pair[1], f"{where}[1]")
    draft.add("user", _prompt(row, draft), "instruction")


def _prompt(row: dict[str, Any], draft: Draft) -> Any:
    instruction, extra = row["instruction"], row.get("input")
    if extra is None or extra == "":
        return instruction
    if not isinstance(extra, str):
        draft.refuse("wrong-type", "input", f"expected text, found {json_type(extra)}")
        return instruction
    if not isinstance(instruction, str) or not extra.strip():
        return instruction
    return f"{instruction}\n\n{extra}" if instruction.strip() else extra


FORMAT = Format(
    name="alpaca",
    kind="conversation",
    required=frozenset({"instruction", "output"}),
    optional=frozenset({"input", "system", "history"}),
    parse=parse,
)
