"""Each format becomes the same messages, and each fault is named by its field."""

from typing import Any

import pytest

from core.data.conversation import MAX_MESSAGES
from core.data.formats import FORMATS
from core.errors import InvalidInput

TURN = [("user", "q"), ("assistant", "a")]


def parse(name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(message) for message in FORMATS[name].parse(row)]  # type: ignore[misc]


def faults(name: str, row: dict[str, Any]) -> list[tuple[str, str | None]]:
    with pytest.raises(InvalidInput) as caught:
        FORMATS[name].parse(row)
    return [(problem.code, problem.field) for problem in caught.value.problems]


def chat(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def share(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": tag, "value": value} for tag, value in turns]}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("alpaca", {"instruction": "q", "input": "", "output": "a", "system": "", "history": []}),
        ("alpaca", {"instruction": "q", "input": None, "output": "a", "history": None}),
        ("sharegpt", share(("human", "q"), ("gpt", "a"))),
        ("sharegpt", share(("user", "q"), ("assistant", "a"))),
        ("messages", chat(*TURN)),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
    ],
)
def test_one_turn_reads_the_same_in_every_format(name: str, row: dict[str, Any]) -> None:
    assert parse(name, row) == TURN


def test_alpaca_joins_its_input_by_a_blank_line_and_puts_history_first() -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert parse("alpaca", row) == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q\n\ni"),
        ("assistant", "a"),
    ]


def test_a_system_message_may_stand_first_whatever_it_is_called() -> None:
    assert parse("messages", chat(("developer", "s"), *TURN))[0] == ("system", "s")
    assert parse("sharegpt", share(("system", "s"), ("human", "q"), ("gpt", "a")))[0] == ("system", "s")
    assert parse("sharegpt", share(("human", "q"), ("gpt", "a")) | {"system": "s"})[0] == ("system", "s")


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("alpaca", {"instruction": 1, "output": ["a"]}, [("wrong-type", "instruction"), ("wrong-type", "output")]),
        ("alpaca", {"instruction": "q", "input": 5, "output": " \n"}, [("wrong-type", "input"), ("empty-target", "output")]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, [("wrong-type", "history[0]")]),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["x", ""]]}, [("empty-target", "history[0][1]")]),
        ("alpaca", {"instruction": "q", "output": "a", "history": "x"}, [("wrong-type", "history")]),
        ("alpaca", {"instruction": " ", "input": "", "output": "a"}, [("empty-prompt", "instruction")]),
        ("prompt_completion", {"prompt": "q", "completion": None}, [("wrong-type", "completion")]),
        ("messages", chat(("user", None), ("assistant", "a")), [("wrong-type", "messages[0].content")]),
        ("messages", chat(("user", [{"type": "text"}]), ("assistant", "a")), [("wrong-type", "messages[0].content")]),
        ("messages", chat(("wizard", "x"), ("assistant", "a")), [("bad-role", "messages[0].role")]),
        ("messages", chat((7, "x"), ("assistant", "a")), [("wrong-type", "messages[0].role")]),
        ("messages", chat(("user", "q"), ("tool", "a")), [("tools-not-supported", "messages[1].role")]),
        ("messages", {"messages": "x"}, [("wrong-type", "messages")]),
        ("messages", {"messages": ["x"]}, [("wrong-type", "messages[0]")]),
        ("messages", {"messages": [{"role": "user"}]}, [("missing-field", "messages[0].content")]),
        ("messages", {"messages": []}, [("bad-roles", "messages")]),
        ("messages", chat(("assistant", "a"), ("user", "q"), ("assistant", "a")), [("bad-roles", "messages[0].content")]),
        ("messages", chat(("user", "q"), ("user", "q"), ("assistant", "a")), [("bad-roles", "messages[1].content")]),
        ("messages", chat(*TURN, ("assistant", "b")), [("bad-roles", "messages[2].content")]),
        ("messages", chat(("system", "s"), ("system", "s"), *TURN), [("bad-roles", "messages[1].content")]),
        ("messages", chat(("user", "q")), [("bad-roles", "messages")]),
        ("messages", chat(*TURN * (MAX_MESSAGES // 2 + 1)), [("too-many-turns", "messages")]),
        ("sharegpt", share(("human", "q"), ("function_call", "{}")), [("tools-not-supported", "conversations[1].from")]),
        ("sharegpt", share(("human", "q"), ("robot", "a")), [("bad-role", "conversations[1].from")]),
        ("sharegpt", share(("human", "q"), ([], "a")), [("wrong-type", "conversations[1].from")]),
        ("sharegpt", {"conversations": [{"role": "user", "content": "q"}]},
         [("missing-field", "conversations[0].from"), ("missing-field", "conversations[0].value")]),
    ],
)  # fmt: skip
def test_every_fault_is_named_by_code_and_field(name: str, row: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert faults(name, row) == wanted


def test_a_role_in_the_wrong_case_is_pointed_out() -> None:
    with pytest.raises(InvalidInput) as caught:
        FORMATS["messages"].parse(chat(("User", "q"), ("assistant", "a")))
    assert 'did you mean "user"?' in caught.value.problems[0].message


def test_unknown_fields_are_named_down_to_the_items() -> None:
    row = {"messages": [{"role": "user", "content": "q", "weight": 0}], "id": 1}
    assert FORMATS["messages"].unknown_fields(row) == {"id", "messages[].weight"}
