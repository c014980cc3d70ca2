"""Archives judged: every way to write rows about pictures, from real and made pictures, and the words for what is wrong."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from core.data.conversation import Message, Parsed, PictureChat, PicturePair, PictureQuestion, kind_of
from core.data.pictures.formats import coco_format, picture_formats
from core.data.pictures.names import PictureNames
from core.data.pictures.validate import validate_pictures
from core.data.rows import read_row, write_row
from core.records import DatasetReport
from core.spec import SftObjective
from tests.core.data.pictures.draw import DATA, noise, saved, write_tar, write_zip

VISION = DATA / "vision"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the test data is not beside this checkout")
PICTURES = {f"images/{name}.png": saved(noise(number)) for number, name in enumerate("abc")}


def judge(path: Path) -> tuple[DatasetReport, dict[int, Parsed]]:
    kept: dict[int, Parsed] = {}
    before = sorted(path.parent.iterdir())
    report = validate_pictures(path, path.parent, kept.__setitem__)
    assert sorted(path.parent.iterdir()) == before
    if report.usable_rows:
        assert len(kept) == report.usable_rows
        assert {kind_of(row) for row in kept.values()} == {report.kind}
        assert [read_row(write_row(number, row)) for number, row in kept.items()] == list(kept.items())
    return report, kept


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(*rows: list[str]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def archive(tmp_path: Path, annotations: bytes, name: str = "metadata.jsonl", pictures: dict[str, bytes] = PICTURES) -> Path:
    return write_zip(tmp_path / "upload", {**pictures, name: annotations})


def errors(report: DatasetReport) -> list[tuple[int | None, str | None, str, str]]:
    assert report.error_count == len(report.errors)
    return [(problem.row, problem.field, problem.code, problem.message) for problem in report.errors]


def warnings(report: DatasetReport) -> list[tuple[str, str]]:
    return [(problem.code, problem.message) for problem in report.warnings]


def of_folder(tmp_path: Path, folder: Path, annotations: str) -> Path:
    members = {f"images/{path.name}": path.read_bytes() for path in sorted((folder / "images").iterdir())}
    return write_zip(tmp_path / "upload", {**members, annotations: (folder / annotations).read_bytes()})


@needs_data
@pytest.mark.parametrize(
    ("annotations", "format_name", "rows", "captions"),
    [
        ("metadata.jsonl", "imagefolder", 39, 39),
        ("metadata_zh.jsonl", "imagefolder", 39, 39),
        ("multi_caption.jsonl", "image_captions", 39, 195),
        ("captions.csv", "image_caption", 195, 195),
        ("captions_coco.json", "coco_captions", 39, 195),
    ],
)
def test_real_photos_with_each_of_their_files(
    annotations: str, format_name: str, rows: int, captions: int, tmp_path: Path
) -> None:
    report, kept = judge(of_folder(tmp_path, VISION / "pairs", annotations))
    assert (report.format, report.kind, report.rows, report.usable_rows) == (format_name, "picture_pair", rows, rows)
    assert (report.error_count, report.warning_count, report.pictures) == (0, 0, 39)
    pairs = [row for row in kept.values() if isinstance(row, PicturePair)]
    assert sum(len(pair.captions) for pair in pairs) == captions
    assert all(pair.image.startswith("images/") for pair in pairs)
    assert report.characters == sum(len(caption) for pair in pairs for caption in pair.captions)


@needs_data
@pytest.mark.parametrize(
    ("annotations", "format_name"), [("metadata_zh.jsonl", "imagefolder"), ("pairs_openclip.csv", "open_clip")]
)
def test_real_emoji_with_each_of_their_files(annotations: str, format_name: str, tmp_path: Path) -> None:
    report, _ = judge(of_folder(tmp_path, VISION / "emoji_pairs", annotations))
    assert (report.format, report.usable_rows, report.error_count, report.pictures) == (format_name, 400, 0, 400)


@needs_data
@pytest.mark.parametrize(("name", "rows", "turns"), [("llava_en.json", 39, None), ("llava_zh.json", 120, 240)])
def test_real_llava_files_name_pictures_from_their_own_folder(name: str, rows: int, turns: int | None, tmp_path: Path) -> None:
    data = (VISION / name).read_bytes()
    wanted = [row["image"] for row in json.loads(data)]
    members = [(f"set/{image}", (VISION / image).read_bytes()) for image in dict.fromkeys(wanted)]
    report, kept = judge(write_tar(tmp_path / "upload", [(f"set/{name}", data), *members], "w:gz"))
    assert (report.format, report.kind, report.usable_rows, report.error_count) == ("llava", "picture_chat", rows, 0)
    assert [row.images for row in kept.values() if isinstance(row, PictureChat)] == [[f"set/{image}"] for image in wanted]
    assert turns is None or report.turns == turns


def test_rows_of_pairs_in_every_format(tmp_path: Path) -> None:
    wanted = {1: PicturePair("images/a.png", ["one"]), 2: PicturePair("images/b.png", ["two, 二"])}
    texts = (("images/a.png", "one"), ("images/b.png", "two, 二"))
    coco = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": "x", "file_name": "b.png"}],
        "annotations": [{"id": 1, "image_id": "x", "caption": "two, 二"}, {"id": 2, "image_id": 7, "caption": "one"}],
    }
    files = {
        "imagefolder": ("metadata.jsonl", lines(*({"file_name": image, "text": text} for image, text in texts))),
        "open_clip": ("pairs.csv", table(["filepath", "title"], *map(list, texts))),
        "image_text": ("pairs.jsonl", lines(*({"image": image, "text": text} for image, text in texts))),
        "image_caption": ("blip.json", json.dumps([{"image": i, "caption": t, "image_id": 1} for i, t in texts]).encode()),
        "image_captions": ("many.jsonl", lines(*({"image": image, "captions": [text]} for image, text in texts))),
        "coco_captions": ("captions_train.json", json.dumps(coco, indent=1).encode()),
    }
    for format_name, (name, data) in files.items():
        report, kept = judge(archive(tmp_path, data, name))
        assert (report.format, report.error_count) == (format_name, 0)
        assert kept == wanted
        assert report.pictures == 2
        assert warnings(report) == [("unused-image", 'pictures that no row names: "images/c.png"')]


def test_questions_with_one_answer_several_or_vqas_objects(tmp_path: Path) -> None:
    row = {"image": "images/a.png", "question": "What?", "question_id": 3}
    for given, answers, format_name in (
        ({"answer": "x"}, ["x"], "vqa_answer"),
        ({"answers": ["x", "x", "y"]}, ["x", "x", "y"], "vqa_answers"),
        ({"answers": [{"answer": "x", "answer_confidence": "yes", "answer_id": 1}]}, ["x"], "vqa_answers"),
        ({"answers": [{"answer": "x"}], "answer": "x"}, ["x"], "vqa_answers"),
    ):
        report, kept = judge(archive(tmp_path, lines(row | given)))
        assert (report.format, report.kind) == (format_name, "picture_question")
        assert kept == {1: PictureQuestion("images/a.png", "What?", answers)}
    report, kept = judge(archive(tmp_path, table(["image", "question", "answer"], ["b.png", "Q", "A"]), "vqa.csv"))
    assert kept == {1: PictureQuestion("images/b.png", "Q", ["A"])}


def test_conversations_with_pictures_in_any_turn(tmp_path: Path) -> None:
    def turns(first: str, second: str, role: str = "role", content: str = "content") -> list[dict[str, str]]:
        you, me = ("user", "assistant") if role == "role" else ("human", "gpt")
        return [{role: you, content: first}, {role: me, content: "A"}, {role: you, content: second}, {role: me, content: "B"}]

    two = ("Look <image> here", "and\n<image>")
    messages = [Message("user", two[0]), Message("assistant", "A"), Message("user", two[1]), Message("assistant", "B")]
    both = ["images/a.png", "images/b.png"]
    parts = turns(*two)
    parts[0] |= {"content": [{"type": "text", "text": "Look"}, {"type": "image"}]}  # type: ignore[dict-item]
    for row, format_name, text in (
        ({"conversations": turns(*two, "from", "value"), "image": both, "id": 3}, "llava", two[0]),
        ({"conversations": turns(*two, "from", "value"), "images": both}, "llava", two[0]),
        ({"messages": turns(*two), "images": both}, "messages_images", two[0]),
        ({"messages": parts, "images": both}, "messages_images", "Look\n<image>"),
    ):
        report, kept = judge(archive(tmp_path, json.dumps([row]).encode(), "chat.json"))
        assert (report.format, report.kind, report.turns, report.error_count) == (format_name, "picture_chat", 4, 0)
        assert kept == {1: PictureChat(both, [messages[0]._replace(content=text), *messages[1:]])}
    one = {"conversations": turns("<image>", "more", "from", "value"), "image": "a.png"}
    none = {"conversations": turns("no", "picture", "from", "value")}
    report, kept = judge(archive(tmp_path, lines(one, none)))
    assert [row.images for row in kept.values() if isinstance(row, PictureChat)] == [["images/a.png"], []]


def test_errors_of_conversations_name_row_and_field(tmp_path: Path) -> None:
    def row(value: str, **more: Any) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}], **more}

    alone = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<image>"}], "image": "a.png"}
    rows = [
        row("none", image="a.png"),
        row("<image><image>", image="a.png"),
        row("<image>"),
        row("<image>", images=["a.png", 3, "gone.png"]),
        alone,
        {"conversations": [{"from": "human", "value": 3}], "image": "a.png"},
        row("<image>", image="a.png", video="v.mp4"),
    ]
    report, kept = judge(archive(tmp_path, lines(*rows)))
    assert kept == {}
    assert errors(report) == [
        (1, "conversations", "image-count", "<image> stands 0 times and 1 pictures are named"),
        (2, "conversations", "image-count", "<image> stands 2 times and 1 pictures are named"),
        (3, "conversations", "image-count", "<image> stands 1 times and 0 pictures are named"),
        (4, "conversations", "image-count", "<image> stands 1 times and 3 pictures are named"),
        (4, "images[1]", "wrong-type", "expected a picture's name, found a number"),
        (4, "images[2]", "missing-image", '"gone.png" is not in the archive'),
        (5, "conversations", "empty-target", "message 2 is <image> alone, which can't be learned"),
        (6, "conversations[0].value", "wrong-type", "expected text, found a number"),
        (7, "video", "media-not-supported", "video and audio can't be trained on yet"),
    ]


def test_errors_of_pairs_and_questions_come_all_at_once(tmp_path: Path) -> None:
    report, kept = judge(
        archive(
            tmp_path,
            lines(
                {"image": "gone.png", "question": " ", "answers": []},
                {"image": 1, "question": 2, "answers": ["x", "", 3]},
                {"image": "images/a.png", "question": "Q", "answers": "x"},
                {"image": "images/a.png", "caption": "c"},
            ),
        )
    )
    assert kept == {3: PictureQuestion("images/a.png", "Q", ["x"])}
    assert errors(report) == [
        (1, "image", "missing-image", '"gone.png" is not in the archive'),
        (1, "question", "empty-prompt", "a question without text"),
        (1, "answers", "empty-target", "an empty list; an answer is needed"),
        (2, "image", "wrong-type", "expected a picture's name, found a number"),
        (2, "question", "wrong-type", "expected text, found a number"),
        (2, "answers[1]", "empty-target", "an answer without text can't be learned"),
        (2, "answers[2]", "wrong-type", "expected text, found a number"),
        (4, None, "mixed-format", "row 4 is image_caption, row 1 is vqa_answers; a file has one format"),
    ]


def test_names_that_point_elsewhere_or_nowhere(tmp_path: Path) -> None:
    pictures = {**PICTURES, "other/a.png": PICTURES["images/a.png"], "images/D.PNG": PICTURES["images/c.png"]}
    names = [
        "../a.png",
        "/etc/passwd",
        "http://x/a.png",
        "file:///a",
        "C:\\a.png",
        "data:image/png;base64,AA==",
        "a.png",
        "d.png",
        "",
    ]
    report, _ = judge(archive(tmp_path, lines(*({"file_name": name, "text": "t"} for name in names)), pictures=pictures))
    assert [(row, code) for row, _, code, _ in errors(report)] == [
        *((number, "image-ref") for number in range(1, 8)),
        (8, "missing-image"),
        (9, "missing-image"),
    ]
    texts = [message for *_, message in errors(report)]
    assert texts[0] == '"../a.png" points out of the archive; name a picture inside it'
    assert texts[6] == '"a.png" may be "images/a.png" or "other/a.png"; name it with its folder'
    assert texts[7] == '"d.png" is not in the archive; did you mean "images/D.PNG"?'


def test_a_picture_that_can_not_be_decoded_costs_the_rows_that_name_it(tmp_path: Path) -> None:
    pictures = {"a.png": b"text", "b.png": saved(noise(0), "JPEG"), "c.jpg": saved(noise(1, 99, 99), "JPEG")[:900], "d.gif": b""}
    report, kept = judge(
        archive(tmp_path, lines(*({"file_name": name, "text": "t"} for name in ["a.png", "b.png", "c.jpg"])), pictures=pictures)
    )
    assert list(kept) == [2]  # by content, whatever its name says
    found = errors(report)
    assert [(row, field, code) for row, field, code, _ in found] == [(1, "file_name", "bad-image"), (3, "file_name", "bad-image")]
    assert found[0][3].startswith("a.png: not a picture of a known format")
    assert found[1][3].startswith("c.jpg: can't be decoded: ")
    assert warnings(report) == [("bad-image", "d.gif: an empty file; no row names it")]


def test_a_picture_of_a_kind_that_is_not_read_is_not_said_to_be_missing(tmp_path: Path) -> None:
    rows = lines({"file_name": "a.heic", "text": "t"}, {"file_name": "images/b.png", "text": "t"})
    report, kept = judge(archive(tmp_path, rows, pictures={**PICTURES, "a.heic": b"1"}))
    assert list(kept) == [2]
    ((row, field, code, message),) = errors(report)
    assert (row, field, code) == (1, "file_name", "bad-image")
    assert message.startswith("a.heic: not a picture by its name; read are bmp, ")


def test_a_job_over_rows_of_another_kind_is_told_what_they_are(tmp_path: Path) -> None:
    report, _ = judge(archive(tmp_path, lines({"file_name": "images/b.png", "text": "t"})))
    sentence = report.wrong_kind("ds_1", SftObjective())
    assert sentence is not None
    assert sentence.startswith("ds_1 holds picture_pair rows (format imagefolder), which are for ")


def test_what_deserves_a_look(tmp_path: Path) -> None:
    gif = saved(Image.fromarray(noise(0)), "GIF", save_all=True, append_images=[Image.fromarray(noise(1))])
    pictures = {**PICTURES, "m.gif": gif, "LICENSE": b"x", "notes.txt": b"x"}
    rows = lines({"file_name": "m.gif", "text": "t", "more": 1}, {"file_name": "m.gif", "text": "t"})
    report, kept = judge(archive(tmp_path, b"\xef\xbb\xbf" + rows, pictures=pictures))
    assert len(kept) == 2
    assert report.duplicate_rows == 1
    assert warnings(report) == [
        ("utf8-bom", '"metadata.jsonl" begins with a byte order mark, which was dropped'),
        ("duplicate-row", "the same as row 1"),
        ("unknown-field", "not part of the format and ignored: more"),
        ("unused-image", 'pictures that no row names: "images/a.png", "images/b.png", "images/c.png"'),
        ("ignored-file", 'neither pictures nor the annotations, and ignored: "LICENSE", "notes.txt"'),
        ("first-frame", '"m.gif": animated: the first frame is used'),
    ]


def test_errors_of_a_coco_file(tmp_path: Path) -> None:
    coco = {
        "images": [
            {"id": 1, "file_name": "a.png"},
            {"id": 1, "file_name": "b.png"},
            {"id": 2},
            3,
            {"id": 4, "file_name": "b.png"},
            {"id": 5, "file_name": "c.png"},
        ],
        "annotations": [
            {"image_id": 1, "caption": "x"},
            {"image_id": 9, "caption": "x"},
            {"image_id": 1},
            "no",
            {"image_id": 5, "caption": 5},
        ],
    }
    report, kept = judge(archive(tmp_path, json.dumps(coco).encode(), "coco.json"))
    assert kept == {1: PicturePair("images/a.png", ["x"])}
    assert report.rows == 6
    assert errors(report) == [
        (None, "annotations[1].image_id", "unknown-image-id", 'the image_id "9" is of no entry of images'),
        (None, "annotations[2].caption", "missing-field", "caption is missing"),
        (None, "annotations[3]", "wrong-type", "expected an object, found text"),
        (2, "images[1].id", "duplicate-id", 'the id "1" stands twice in images'),
        (3, "images[2]", "missing-field", "file_name missing or of a wrong type"),
        (4, "images[3]", "wrong-type", "expected an object, found a number"),
        (5, "captions", "empty-target", "an empty list; a caption is needed"),
        (6, "captions[0]", "wrong-type", "expected text, found a number"),
    ]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_webdataset_shard(mode: str, tmp_path: Path) -> None:
    png = list(PICTURES.values())
    members = [
        ("000.png", png[0]), ("000.txt", b"zero\n"), ("000.json", b'{"url": "http://x", "status": "ok"}'),
        ("001.png", png[1]), ("001.cap", "一".encode()),
        ("d/002.jpg", png[2]), ("d/002.caption", b"two"),
    ]  # fmt: skip
    report, kept = judge(write_tar(tmp_path / "upload", members, mode))
    assert (report.format, report.error_count, report.warning_count) == ("image_text", 0, 0)
    assert kept == {
        1: PicturePair("000.png", ["zero"]),
        2: PicturePair("001.png", ["一"]),
        3: PicturePair("d/002.jpg", ["two"]),
    }


def test_a_webdataset_shard_of_conversations(tmp_path: Path) -> None:
    chat = {"conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]}
    members = [
        (f"{name}.{end}", data)
        for name in "01"
        for end, data in (("json", json.dumps(chat).encode()), ("png", PICTURES["images/a.png"]))
    ]
    report, kept = judge(write_tar(tmp_path / "upload", members))
    assert (report.format, report.usable_rows, report.pictures) == ("llava", 2, 2)
    assert [row.images for row in kept.values() if isinstance(row, PictureChat)] == [["0.png"], ["1.png"]]


def test_errors_of_a_shard(tmp_path: Path) -> None:
    png = PICTURES["images/a.png"]
    members = [
        ("0.png", png), ("0.txt", b"ok"),
        ("1.png", png),
        ("2.png", png), ("2.txt", b"caf\xe9"),
        ("3.png", png), ("3.jpg", png), ("3.txt", b"ok"),
        ("4.png", png), ("4.json", b'{"text": '),
        ("5.png", png), ("5.json", b"[]"),
        ("6.png", png), ("6.txt", b"  "),
        ("7.png", png), ("7.json", b'{"text": NaN}'),
    ]  # fmt: skip
    report, kept = judge(write_tar(tmp_path / "upload", members))
    assert list(kept) == [1, 4]
    assert errors(report) == [
        (2, None, "missing-caption", '"1.png" has no text beside it'),
        (3, None, "not-utf8", '"2.txt": byte 3 is not UTF-8'),
        (5, None, "duplicate-stem", '"3.jpg" has the stem of "3.png", so their texts can\'t be told apart'),
        (6, None, "invalid-json", '"4.json": line 1 column 9: Expecting value'),
        (7, None, "not-an-object", '"5.json": a row must be a JSON object'),
        (8, "text", "empty-target", "a caption without text can't be learned"),
        (9, None, "invalid-json-value", '"7.json": NaN is not a JSON value'),
    ]


def test_which_file_holds_the_annotations_is_never_guessed(tmp_path: Path) -> None:
    rows = lines({"file_name": "images/a.png", "text": "t"})
    report, _ = judge(write_zip(tmp_path / "upload", {**PICTURES, "one.jsonl": rows, "two.csv": b"filepath,title\na.png,t\n"}))
    assert errors(report) == [
        (
            None,
            None,
            "several-annotations",
            'several files may be the annotations ("one.jsonl", "two.csv"); leave one, or name it metadata.jsonl',
        )
    ]
    report, kept = judge(write_zip(tmp_path / "upload", {**PICTURES, "metadata.jsonl": rows, "two.csv": b""}))
    assert len(kept) == 1
    assert ("ignored-file", 'neither pictures nor the annotations, and ignored: "two.csv"') in warnings(report)
    report, _ = judge(write_zip(tmp_path / "upload", PICTURES))
    assert [code for _, _, code, _ in errors(report)] == ["no-annotations"]
    report, _ = judge(write_zip(tmp_path / "upload", {}))
    assert [code for _, _, code, _ in errors(report)] == ["no-annotations"]


def test_an_archive_with_a_refused_member_is_not_used_and_all_is_said(tmp_path: Path) -> None:
    rows = lines({"file_name": "images/a.png", "text": "t"}, {"file_name": "gone.png", "text": "t"})
    report, _ = judge(write_zip(tmp_path / "upload", {**PICTURES, "../x": b"1", "metadata.jsonl": rows}))
    assert (report.rows, report.usable_rows, report.pictures) == (2, 0, 0)
    assert [(row, code) for row, _, code, _ in errors(report)] == [
        (None, "refused-archive"),
        (None, "unsafe-archive-member"),
        (2, "missing-image"),
    ]


def test_annotations_that_can_not_be_read_spoil_the_dataset(tmp_path: Path) -> None:
    for data, name, code in (
        (b"[1", "a.json", "invalid-json"),
        (b'{"a": 1}\n{', "a.jsonl", "unknown-format"),
        (b'{\n"a": 1}', "a.json", "top-level-object"),
        (b"\xff\xfea\0", "a.jsonl", "not-utf8"),
        (b"", "a.jsonl", "empty-dataset"),
        (b'{"images": [], "annotations": []}', "a.json", "empty-dataset"),
        (b'{"instruction": "i", "output": "o"}', "a.jsonl", "unknown-format"),
    ):
        report, kept = judge(archive(tmp_path, data, name))
        assert kept == {}
        assert report.usable_rows == 0
        assert report.errors[0].code == code


def test_other_archives_are_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    report, _ = judge(tmp_path / "upload")
    assert errors(report) == [(None, None, "archive-not-supported", "a 7z archive; pack the files as zip, tar or tar.gz")]


def _examples() -> Iterator[tuple[str, int, list[tuple[int | None, str]]]]:
    yield "23_zip_slip.zip", 0, [(None, "refused-archive"), *[(None, "unsafe-archive-member")] * 4]
    yield "24_zip_symlink.zip", 0, [(None, "refused-archive"), (None, "unsafe-archive-member"), (1, "missing-image")]
    yield "25_zip_bomb_1gb.zip", 0, [(None, "archive-expands-too-far")]
    yield "26_image_wrong_magic.zip", 1, [(1, "bad-image")]
    yield "28_truncated_jpeg.zip", 0, [(1, "bad-image")]
    yield "29_missing_and_orphan_images.zip", 1, [(2, "missing-image")]


@needs_data
@pytest.mark.parametrize(("name", "usable", "wanted"), list(_examples()))
def test_the_broken_examples(name: str, usable: int, wanted: list[tuple[int | None, str]], tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes((DATA / "bad" / name).read_bytes())
    report, _ = judge(tmp_path / "upload")
    assert [(row, code) for row, _, code, _ in errors(report)] == wanted
    assert report.usable_rows == usable
    if name.startswith("29"):
        assert warnings(report) == [("unused-image", 'pictures that no row names: "orphan.png"')]


@needs_data
@pytest.mark.parametrize(
    ("name", "code"), [("30_llava_tag_mismatch.json", "image-count"), ("31_image_path_traversal.json", "image-ref")]
)
def test_broken_llava_rows(name: str, code: str, tmp_path: Path) -> None:
    data = (DATA / "bad" / name).read_bytes()
    report, kept = judge(
        archive(tmp_path, data, "llava.json", {"a.png": PICTURES["images/a.png"], "b.png": PICTURES["images/b.png"]})
    )
    assert {found for _, _, found, _ in errors(report)} >= {code}
    assert {row for row, *_ in errors(report)} == set(range(1, len(json.loads(data)) + 1)) - set(kept)


def test_the_page_on_data_shows_a_row_of_each_format() -> None:
    page = (Path(__file__).resolve().parents[4] / "docs" / "data.md").read_text()
    lines = re.findall(r"^\| (\w+) \| (\w+) \| [^|]+ \| `(.*)` \|$", page, re.M)
    formats = picture_formats(PictureNames({"images/1.jpg": None, "1.jpg": None, "2.jpg": None}))
    assert {name for name, *_ in lines} == formats.keys()
    for name, kind, row in lines:
        value = json.loads(row)
        assert next(known.name for known in formats.values() if known.matches(value)) == name
        assert kind == formats[name].kind == kind_of(formats[name].parse(value))
        assert formats[name].unknown_fields(value) == set()


def test_formats_of_the_report_are_the_formats_on_offer() -> None:
    described = DatasetReport.model_fields["format"].description or ""
    formats = picture_formats(PictureNames({}))
    assert all(name in described for name in [*formats, coco_format(PictureNames({})).name])
