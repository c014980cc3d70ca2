"""Uploads judged: the real files in full, the broken ones as their list of expectations says."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.conversation import Parsed, PlainText, Preference
from core.data.validate import KEPT_PROBLEMS, LONG_ROW_CHARACTERS, validate
from core.records import DatasetReport
from core.spec import DpoObjective, OrpoObjective, PlainTextObjective, SftObjective

DATA = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the test data is not beside this checkout")


def judge(path: Path) -> tuple[DatasetReport, dict[int, Any]]:
    """The report, and by row number what was kept: (role, content) pairs of a conversation, else what the format gave."""
    kept: dict[int, Any] = {}

    def keep(number: int, parsed: Parsed) -> None:
        kept[number] = [(message.role, message.content) for message in parsed] if isinstance(parsed, list) else parsed

    return validate(path, path.name, keep), kept


def upload(tmp_path: Path, *rows: object, name: str = "d.jsonl") -> DatasetReport:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return judge(path)[0]


def errors(report: DatasetReport) -> list[tuple[int | None, str | None, str]]:
    return [(problem.row, problem.field, problem.code) for problem in report.errors]


def codes(report: DatasetReport) -> list[str]:
    return [problem.code for problem in report.warnings]


@needs_data
@pytest.mark.parametrize(
    ("name", "format_name", "rows"),
    [
        ("alpaca_en.json", "alpaca", 999),
        ("alpaca_zh.json", "alpaca", 1000),
        ("identity_alpaca_placeholders.json", "alpaca", 91),
        ("alpaca_seed_en.jsonl", "alpaca", 175),
        ("alpaca_seed_zh.jsonl", "alpaca", 175),
        ("alpaca_mixed.csv", "alpaca", 200),
        ("sharegpt_en.json", "sharegpt", 500),
        ("messages.jsonl", "messages", 675),
        ("prompt_completion.jsonl", "prompt_completion", 1319),
    ],
)
def test_real_files_are_read_whole(name: str, format_name: str, rows: int) -> None:
    report, kept = judge(DATA / "text" / name)
    assert (report.format, report.rows, report.usable_rows, report.error_count) == (format_name, rows, rows, 0)
    assert report.kind == "conversation"
    assert len(kept) == rows
    assert report.turns == sum(map(len, kept.values()))
    assert report.characters == sum(len(content) for messages in kept.values() for _, content in messages)


@needs_data
def test_csv_and_json_lines_of_the_same_rows_agree() -> None:
    _, table = judge(DATA / "text" / "alpaca_mixed.csv")
    _, english = judge(DATA / "text" / "alpaca_seed_en.jsonl")
    assert table[1] == english[1]


@needs_data
def test_rows_with_tools_are_refused_and_the_others_used() -> None:
    report, _ = judge(DATA / "text" / "sharegpt_tools_zh.json")
    assert (report.rows, report.usable_rows) == (300, 141)
    assert {problem.code for problem in report.errors} == {"tools-not-supported"}
    assert len(report.errors) == KEPT_PROBLEMS < report.error_count


@needs_data
def test_the_three_files_of_preferences_hold_the_same() -> None:
    shapes = {"preference.json": "preference_sharegpt", "preference_messages.jsonl": "preference"}
    (first, pairs), (second, again) = (judge(DATA / "text" / name) for name in shapes)
    assert [first.format, second.format] == list(shapes.values())
    assert (first.usable_rows, first.error_count, first.kind) == (300, 0, "preference")
    assert set(codes(first)) == {"duplicate-row"}
    assert pairs == again
    assert all(isinstance(pair, Preference) for pair in pairs.values())
    assert first.turns == sum(len(pair.prompt) + 2 for pair in pairs.values())
    assert first.characters == second.characters > 1_000_000

    flat, single = judge(DATA / "text" / "preference_flat.jsonl")
    assert (flat.format, flat.usable_rows, flat.error_count) == ("preference", 114, 0)
    assert list(single.values()) == [pair for pair in pairs.values() if len(pair.prompt) == 1]


@needs_data
@pytest.mark.parametrize("name", ["pairs/metadata.jsonl", "emoji_pairs/metadata_zh.jsonl", "pairs/captions.csv", "llava_en.json"])
def test_captions_of_pictures_are_not_taken_for_texts(name: str) -> None:
    report, kept = judge(DATA / "vision" / name)
    assert not kept
    assert {problem.code for problem in report.errors} <= {"media-not-supported", "unknown-format"}


EXPECTED: dict[str, tuple[int, int, list[tuple[int | None, str | None, str]]]] = {
    "01_utf8_bom.json": (10, 10, []),
    "02_utf16le.json": (0, 0, [(None, None, "not-utf8")]),
    "03_gbk.json": (0, 0, [(None, None, "not-utf8")]),
    "04_truncated.json": (4, 0, [(None, None, "invalid-json")]),
    "05_nan_infinity.json": (2, 0, [(1, None, "invalid-json-value"), (2, None, "invalid-json-value")]),
    "06_ragged.csv": (4, 2, [(2, None, "ragged-row"), (3, None, "ragged-row")]),
    "07_unclosed_quote.csv": (0, 0, [(None, None, "unclosed-quote")]),
    "08_empty_file.json": (0, 0, [(None, None, "empty-dataset")]),
    "09_empty_array.json": (0, 0, [(None, None, "empty-dataset")]),
    "10_whitespace_only.jsonl": (0, 0, [(None, None, "empty-dataset")]),
    "11_empty_outputs.json": (10, 5, [(row, "output", "empty-target") for row in (2, 4, 6, 8, 10)]),
    "12_unknown_roles.jsonl": (
        3, 1, [(2, "messages[0].role", "bad-role"), (3, "messages[0].role", "bad-role"), (3, "messages[1].role", "bad-role")],
    ),
    "13_sharegpt_starts_with_gpt.json": (2, 1, [(1, "conversations[0].value", "bad-roles")]),
    "14_two_users_in_a_row.json": (2, 0, [(1, "conversations[1].value", "bad-roles"), (2, "conversations", "bad-roles")]),
    "15_duplicate_ids.jsonl": (3, 3, []),
    "16_single_line_5mb.json": (1, 1, []),
    "17_mixed_formats.jsonl": (4, 1, [(row, None, "mixed-format") for row in (2, 3, 4)]),
    "18_wrong_types.jsonl": (
        3, 1, [(row, field, "wrong-type") for row in (1, 2) for field in ("instruction", "output")],
    ),
    "19_jsonl_one_bad_line.jsonl": (6, 5, [(4, None, "invalid-json")]),
    "20_top_level_object.json": (1, 0, [(1, None, "top-level-object")]),
    "21_jsonl_named_json.json": (10, 10, []),
    "22_deeply_nested.json": (0, 0, [(None, None, "invalid-json-value")]),
    "30_llava_tag_mismatch.json": (3, 1, [(1, "image", "media-not-supported"), (2, "image", "media-not-supported")]),
    "31_image_path_traversal.json": (3, 0, [(row, "image", "media-not-supported") for row in (1, 2, 3)]),
    "32_preference_same.jsonl": (
        3, 0, [(1, "rejected", "equal-preference"), (2, "rejected", "missing-field"), (3, "prompt", "empty-prompt")],
    ),
    "33_special_tokens_in_text.jsonl": (1, 1, []),
    "34_html_injection.jsonl": (1, 1, []),
    "35_csv_formula.csv": (2, 2, []),
    "36_nul_and_lone_surrogate.jsonl": (
        2, 0, [(1, "instruction", "invalid-json-value"), (2, "instruction", "invalid-json-value")],
    ),
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", EXPECTED)
def test_broken_uploads_are_answered_as_expected(name: str) -> None:
    rows, usable, wanted = EXPECTED[name]
    report, kept = judge(DATA / "bad" / name)
    assert (report.rows, report.usable_rows) == (rows, usable)
    assert errors(report) == wanted
    assert report.error_count == len(wanted)
    assert "\\u0000" not in report.model_dump_json()
    if usable:
        assert len(kept) == usable


@needs_data
def test_broken_uploads_name_their_lines() -> None:
    def lines(name: str) -> list[int | None]:
        return [problem.line for problem in judge(DATA / "bad" / name)[0].errors]

    assert lines("06_ragged.csv") == [3, 4]
    assert lines("07_unclosed_quote.csv") == [2]
    assert lines("19_jsonl_one_bad_line.jsonl") == [4]
    assert "column" in judge(DATA / "bad" / "04_truncated.json")[0].errors[0].message


@needs_data
def test_warnings_name_what_deserves_a_look() -> None:
    assert codes(judge(DATA / "bad" / "01_utf8_bom.json")[0]) == ["utf8-bom"]
    assert codes(judge(DATA / "bad" / "16_single_line_5mb.json")[0]) == ["long-row"]
    report, _ = judge(DATA / "bad" / "15_duplicate_ids.jsonl")
    assert [(problem.row, problem.code) for problem in report.warnings] == [
        (2, "duplicate-id"), (3, "duplicate-row"), (None, "unknown-field"),
    ]  # fmt: skip
    assert report.duplicate_rows == 1
    assert "row 1" in report.warnings[0].message


@needs_data
def test_hostile_text_is_kept_unchanged() -> None:
    _, kept = judge(DATA / "bad" / "35_csv_formula.csv")
    assert kept[1] == [("user", '=HYPERLINK("http://x","y")'), ("assistant", "+1")]
    _, kept = judge(DATA / "bad" / "34_html_injection.jsonl")
    assert kept[1][1] == ("assistant", "{{7*7}} ${7*7}")


def test_the_examples_have_no_errors() -> None:
    for name in ("alpaca_seed_en.jsonl", "alpaca_seed_zh.jsonl"):
        report, _ = judge(EXAMPLES / name)
        assert (report.usable_rows, report.error_count) == (175, 0)


def test_the_first_row_with_a_format_decides_and_mixed_rows_name_both(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    report = upload(tmp_path, {"words": "x"}, good, {"instruction": "q", "output": "a"}, {"prompt": "q"})
    assert report.format == "prompt_completion"
    assert errors(report) == [(1, None, "unknown-format"), (3, None, "mixed-format"), (4, "completion", "missing-field")]
    assert "row 3 is alpaca, row 2 is prompt_completion" in report.errors[1].message
    assert report.usable_rows == 1


def test_problems_are_all_counted_and_the_first_hundred_kept(tmp_path: Path) -> None:
    report = upload(tmp_path, *[{"prompt": "q", "completion": ""}] * 250)
    assert (report.error_count, len(report.errors), report.errors[-1].row) == (250, KEPT_PROBLEMS, 100)


def test_what_breaks_the_file_leads_the_errors_and_leaves_no_usable_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "q", "completion": ""}\n' * 150 + b'{"prompt": "q", "completion": "a"}\n\xff')
    report, _ = judge(path)
    assert report.errors[0].code == "not-utf8"
    assert (report.usable_rows, report.error_count, len(report.errors)) == (0, 151, KEPT_PROBLEMS)


def test_a_conversation_that_ends_with_the_user_is_used_with_a_warning(tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "a"), ("user", "bye")]
    report = upload(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    assert report.usable_rows == 1
    assert codes(report) == ["ends-with-user"]


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ANSWERS = {"chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "format_name"),
    [
        ({"prompt": "q", **ANSWERS, "messages": CHAT}, "preference"),
        ({"prompt": "q", "completion": "a", **ANSWERS}, "preference"),
        ({"instruction": "q", "output": "", "input": "", **ANSWERS}, "preference_alpaca"),
        ({"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": SHARE[1] | {"value": "b"}}, "preference_sharegpt"),
        ({"instruction": "q", "output": "a", "text": "q a"}, "alpaca"),
        ({"messages": CHAT, "text": "q a"}, "messages"),
        ({"prompt": "q", "completion": "a", "text": "q a"}, "prompt_completion"),
        ({"text": "q a", "label": 1, "file_name": "a.py"}, "text"),
    ],
)
def test_a_row_that_could_be_of_several_formats_is_of_the_one_that_asks_for_more(
    tmp_path: Path, row: dict[str, Any], format_name: str
) -> None:
    report = upload(tmp_path, row)
    assert (report.format, report.usable_rows) == (format_name, 1)
    assert codes(report) == ([] if format_name == "preference_sharegpt" else ["unknown-field"])


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": CHAT, **ANSWERS}, ["chosen", "rejected"]),
        ({"messages": CHAT, "rejected_response": "bad"}, ["rejected_response"]),
        ({"conversations": SHARE, "rejected": "bad"}, ["rejected"]),
        ({"prompt": "q", "completion": "a", "chosen": "good"}, ["chosen"]),
        ({"text": "x", "preferred_output": "good"}, ["preferred_output"]),
        ({"prompt": "q", "chosen": "good"}, ["chosen"]),
    ],
)
def test_answers_to_prefer_in_no_known_shape_are_refused_rather_than_ignored(
    tmp_path: Path, row: dict[str, Any], fields: list[str]
) -> None:
    report = upload(tmp_path, row)
    assert errors(report) == [(1, field, "preference-not-supported") for field in fields]
    assert report.usable_rows == 0


def test_a_row_is_of_one_format_whatever_the_file_is(tmp_path: Path) -> None:
    pair = {"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": SHARE[1] | {"value": "b"}}
    report = upload(tmp_path, {"conversations": SHARE}, pair)
    assert errors(report) == [(2, None, "mixed-format")]
    report = upload(tmp_path, pair, {"conversations": SHARE}, {"conversations": SHARE, "chosen": SHARE[1]}, {"conversations": []})
    assert errors(report) == [(2, None, "mixed-format"), (3, "rejected", "missing-field"), (4, None, "mixed-format")]
    both = [*CHAT[:1], CHAT[1] | {"content": "b"}]
    report = upload(tmp_path, {"chosen": CHAT, "rejected": both}, {"prompt": "q", **ANSWERS}, {"text": "x"})
    assert report.format == "preference_implicit"
    assert errors(report) == [(2, None, "mixed-format"), (3, None, "mixed-format")]
    report = upload(tmp_path, {"text": "x"}, {"text": "x", "messages": CHAT})
    assert errors(report) == [(2, None, "mixed-format")]


def test_pictures_are_refused_in_preferences_and_texts_too(tmp_path: Path) -> None:
    report = upload(tmp_path, {"prompt": "q", **ANSWERS, "images": ["a.png"]}, {"text": "x", "image": "a.png"})
    assert errors(report) == [
        (1, "images", "media-not-supported"),
        (2, "image", "media-not-supported"),
        (2, None, "mixed-format"),
    ]


def test_texts_are_counted_and_a_long_one_is_no_reason_to_warn(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "x" * (LONG_ROW_CHARACTERS + 1), "ab", " ")))
    report, kept = judge(path)
    assert (report.format, report.kind, report.rows, report.usable_rows) == ("text", "text", 4, 3)
    assert (report.turns, report.characters, report.duplicate_rows) == (0, LONG_ROW_CHARACTERS + 5, 1)
    assert codes(report) == ["duplicate-row"]
    assert errors(report) == [(4, "text", "empty-target")]
    assert kept[1] == PlainText("ab")


def test_a_conversation_whose_answers_all_have_weight_0_is_used_with_a_warning(tmp_path: Path) -> None:
    silent = [CHAT[0], CHAT[1] | {"weight": 0}]
    report = upload(
        tmp_path, {"messages": silent}, {"messages": [*silent, *CHAT]}, {"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}
    )
    assert (report.usable_rows, [(warning.row, warning.code) for warning in report.warnings]) == (2, [(1, "no-weight")])
    assert errors(report) == [(3, "messages[0].weight", "bad-weight")]


def test_a_report_stored_before_kinds_were_named_is_one_of_conversations() -> None:
    stored = {"format": "alpaca", "rows": 1, "usable_rows": 1, "error_count": 0, "warning_count": 0, "errors": [], "warnings": []}
    report = DatasetReport.model_validate(stored)
    assert report.kind is None
    assert report.wrong_kind("ds_1", SftObjective()) is None
    assert report.wrong_kind("ds_1", DpoObjective()) == (
        "ds_1 holds conversation rows (format alpaca), which are for objective sft; objective dpo trains on preference rows"
    )
    pairs = DatasetReport.model_validate(stored | {"kind": "preference", "format": "preference"})
    assert pairs.wrong_kind("ds_1", OrpoObjective()) is None
    assert "which are for objective dpo or orpo; objective plain_text" in (pairs.wrong_kind("ds_1", PlainTextObjective()) or "")
