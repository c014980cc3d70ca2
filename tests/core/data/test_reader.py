"""The reader takes what RFC 8259 and RFC 4180 mean, names the place of anything else, and never blows up."""

from pathlib import Path

import pytest

from core.data import reader
from core.data.reader import Row, open_rows
from core.data.strict_json import first_too_deep
from core.errors import Problem, Unparsable


def rows_of(tmp_path: Path, content: bytes | str, name: str = "x.jsonl") -> list[Row | Problem]:
    path = tmp_path / "upload"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(open_rows(path, name).rows)


def refusal(tmp_path: Path, content: bytes | str, name: str = "x.jsonl") -> Problem:
    with pytest.raises(Unparsable) as caught:
        rows_of(tmp_path, content, name)
    (problem,) = caught.value.problems
    return problem


def test_array_lines_and_csv_give_the_same_rows_whatever_the_name(tmp_path: Path) -> None:
    array = '[{"a": "1", "b": "x"},\n {"a": "2", "b": "y"}]'
    lines = '{"a": "1", "b": "x"}\r\n\n{"a": "2", "b": "y"}'
    table = 'a,b\n1,x\n2,"y"\n'
    wanted = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    for content, name in [(array, "d.jsonl"), (lines, "d.json"), (lines, "d.csv"), (table, "d.csv"), (table, "d.txt")]:
        got = rows_of(tmp_path, content, name)
        assert [row.value for row in got if isinstance(row, Row)] == wanted, name
        assert [row.line for row in got] == ([1, 2] if content is array else [1, 3] if content is lines else [2, 3])


def test_csv_rows_begin_where_their_record_begins(tmp_path: Path) -> None:
    got = rows_of(tmp_path, 'a,b\n"one\ntwo","x ""y"""\n3,4\n', "d.csv")
    assert got == [Row(1, 2, {"a": "one\ntwo", "b": 'x "y"'}), Row(2, 4, {"a": "3", "b": "4"})]


@pytest.mark.parametrize(
    "line",
    [
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 2}}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": 1.' + "9" * 5000 + "}",
        '{"a": "x\\u0000"}',
        '{"a": ["\\udc00"]}',
        '{"\\ud800": 1}',
        '{"a": ' + "[" * 65 + "]" * 65 + "}",
        '{"a": ' + "[" * 100_000 + "}",
    ],
)
def test_what_lenient_parsers_let_through_costs_the_row_not_the_file(tmp_path: Path, line: str) -> None:
    got = rows_of(tmp_path, f'{{"ok": 1}}\n{line}\n{{"ok": 2}}\n')
    assert [type(row) for row in got] == [Row, Problem, Row]
    assert isinstance(got[1], Problem)
    assert (got[1].code, got[1].row, got[1].line) == ("invalid-json-value", 2, 2)
    got[1].message.encode()
    assert "\x00" not in got[1].message + (got[1].field or "")


def test_a_paired_surrogate_and_brackets_inside_strings_are_fine(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, '{"a": "\\ud83d\\ude00 ' + "[{" * 200 + '"}')
    assert isinstance(row, Row)
    assert row.value["a"].startswith("😀")


@pytest.mark.parametrize("bad", ["[1, 2]", "3", '"text"', "null"])
def test_a_row_that_is_no_object_is_named(tmp_path: Path, bad: str) -> None:
    (_, problem) = rows_of(tmp_path, '{"a": 1}\n' + bad)
    assert isinstance(problem, Problem)
    assert (problem.code, problem.row) == ("not-an-object", 2)


@pytest.mark.parametrize(
    ("content", "line", "column"),
    [
        ('[{"a": 1},\n {"a": ', 2, 8),
        ('[{"a": 1},\n]', 2, 1),
        ('[{"a": 1}\n{"a": 2}]', 2, 1),
        ('[{"a": 1}]\n x', 2, 2),
        ("[", 1, 2),
    ],
)
def test_a_broken_array_names_line_and_column(tmp_path: Path, content: str, line: int, column: int) -> None:
    problem = refusal(tmp_path, content, "x.json")
    assert (problem.code, problem.line) == ("invalid-json", line)
    assert f"column {column}" in problem.message


def test_a_broken_line_names_line_and_column_and_the_rest_is_read(tmp_path: Path) -> None:
    got = rows_of(tmp_path, '{"a": 1}\n{"a": 1} trailing\n{"a": 1,}\n{"a": 2}')
    assert [getattr(row, "code", "ok") for row in got] == ["ok", "invalid-json", "invalid-json", "ok"]
    assert "line 2 column 10" in got[1].message  # type: ignore[union-attr]


def test_one_object_over_several_lines_is_not_taken_for_json_lines(tmp_path: Path) -> None:
    assert refusal(tmp_path, '{\n "data": [\n  {"a": 1}\n ]\n}').code == "top-level-object"


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path: Path, name: str) -> None:
    content = b"a,b\n1,\xb0\xa1\n" if name == "x.csv" else b'[{"a":\n"\xb0\xa1"}]' if name == "x.json" else b'{"a":1}\n{"\xb0"}'
    problem = refusal(tmp_path, content, name)
    offset = max(content.find(b"\xb0"), 0)
    assert (problem.code, problem.line) == ("not-utf8", 2)
    assert f"byte {offset}" in problem.message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_wide_encodings_are_refused_by_name(tmp_path: Path, encoding: str) -> None:
    problem = refusal(tmp_path, '{"a": "b"}'.encode(encoding))
    assert problem.code == "not-utf8"
    assert "UTF-16" in problem.message


def test_one_bom_is_dropped_and_the_offsets_still_count_it(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    file = open_rows(path, "x.jsonl")
    assert file.has_bom
    assert list(file.rows) == [Row(1, 1, {"a": 1})]
    assert "byte 6" in refusal(tmp_path, b'\xef\xbb\xbf{"a\xff').message


def test_a_line_over_the_limit_costs_one_row_and_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LINE_BYTES", 64)
    got = rows_of(tmp_path, '{"a": 1}\n{"a": "' + "x" * 1000 + '"}\n{"a": 2}\n')
    assert [getattr(row, "code", "ok") for row in got] == ["ok", "line-too-long", "ok"]
    assert [row.line for row in got] == [1, 2, 3]
    got = rows_of(tmp_path, '[{"a": 1}, {"a": "' + "x" * 1000 + '"}, {"a": 2}]')
    assert [getattr(row, "code", "ok") for row in got] == ["ok", "line-too-long", "ok"]
    assert refusal(tmp_path, "a,b\n1," + "x" * 1000, "x.csv").code == "line-too-long"


def test_an_array_over_its_limit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "ARRAY_BYTES", 10)
    assert refusal(tmp_path, '[{"a": 1}, {"a": 2}]').code == "file-too-large"


def test_csv_faults_are_told_apart(tmp_path: Path) -> None:
    got = rows_of(tmp_path, 'a,b\n1,2,3\n"x"y,2\n1,\x00\n1,2\n', "x.csv")
    assert [getattr(row, "code", "ok") for row in got] == ["ragged-row", "invalid-csv", "invalid-text", "ok"]
    assert [row.line for row in got] == [2, 3, 4, 5]
    assert refusal(tmp_path, "a,a\n1,2\n", "x.csv").code == "duplicate-column"
    opened = refusal(tmp_path, 'a,b\n"fine\nstill",2\n1,"open\nx,y\n', "x.csv")
    assert (opened.code, opened.line) == ("unclosed-quote", 4)


@pytest.mark.parametrize("content", ["", " \n\t\r\n", "[]", " [ ] ", "a,b\n", "\ufeff"])
def test_a_file_without_rows_gives_none(tmp_path: Path, content: str) -> None:
    assert rows_of(tmp_path, content, "x.csv") == []


def test_the_depth_check_is_linear_on_its_worst_input() -> None:
    # A naive pattern needs 10^11 steps for an unclosed string full of escaped quotes; this one ends at once.
    assert first_too_deep("[" * 60 + "{" * 4 + '"' + '\\"' * 400_000 + "[" * 100) is None
    assert first_too_deep("[" * 65) == 64
