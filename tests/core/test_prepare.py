"""The preparer's child as its supervisor sees it: a real process, files in a folder, an exit code, death with its stdin."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from core.data.formats import FORMATS
from core.data.pictures.cache import PictureCache
from core.data.render import Rendered, visualize
from core.data.tokenizer import Tokenizer
from core.data.tokens import TokenCache
from core.prepare import prepare_rows, prepare_tokens
from core.records import DatasetReport
from core.run import (
    PICTURES_FOLDER,
    PREPARE_FILE,
    REPORT_FILE,
    ROWS_FILE,
    TOKENS_FOLDER,
    PicturesInput,
    TokenizeInput,
    ValidateInput,
    read_counts,
)
from core.states import Reason
from tests.core.data.pictures.draw import noise, saved, write_zip
from tests.tiny import build_tiny_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def start(work: Path, request: ValidateInput | TokenizeInput | PicturesInput) -> "subprocess.Popen[bytes]":
    (work / PREPARE_FILE).write_text(request.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "core.prepare", str(work)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(child: "subprocess.Popen[bytes]") -> tuple[int, str]:
    """Exit code and stderr of a child whose stdin stays open to its end."""
    assert child.stdin
    assert child.stdout
    assert child.stderr
    code = child.wait(timeout=120)
    said = child.stderr.read().decode()
    for pipe in (child.stdin, child.stdout, child.stderr):
        pipe.close()
    return code, said


def validated(work: Path, upload: Path) -> DatasetReport:
    code, said = finish(start(work, ValidateInput(upload=upload, filename=upload.name)))
    assert (code, said) == (0, "")
    return DatasetReport.model_validate_json((work / REPORT_FILE).read_bytes())


def tokenize(work: Path, model: Path, rows: Path, **choices: object) -> TokenizeInput:
    settings: dict[str, object] = {"template": "model", "max_length": 256, "train_on": "all_turns"} | choices
    return TokenizeInput.model_validate({"dataset_id": "ds_1", "rows": rows, "model_folder": model} | settings)


@pytest.mark.parametrize("name", ["alpaca_seed_en.jsonl", "alpaca_seed_zh.jsonl"])
def test_a_dataset_goes_from_upload_to_tokens(tmp_path: Path, model: Path, name: str) -> None:
    report = validated(tmp_path, EXAMPLES / name)
    assert (report.format, report.usable_rows) == ("alpaca", 175)
    lines = (tmp_path / ROWS_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(1, 176))

    code, said = finish(start(tmp_path, tokenize(tmp_path, model, tmp_path / ROWS_FILE)))
    assert (code, said) == (0, "")
    counts = read_counts(tmp_path)
    cache = TokenCache.open(tmp_path / TOKENS_FOLDER)
    assert counts.rows == 175 == len(cache) + counts.rows_without_target
    assert counts.tokens == int(cache.lengths.sum())
    assert counts.trained_tokens == sum(int(cache.row(i)[1].sum()) for i in range(len(cache)))
    assert int(cache.lengths.max()) <= 256 < counts.longest
    assert counts.truncated_rows > 0
    assert {"tokenizer", "template_digest", "renderer"} <= cache.facts.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [PREPARE_FILE, REPORT_FILE, ROWS_FILE, "counts.json", TOKENS_FOLDER]
    )


@pytest.mark.parametrize("content", [b"", b'[{"instruction": "q', b"\xff\xfe[", b'{"prompt": "q", "completion": ""}'])
def test_a_bad_file_is_a_report_and_not_a_crash(tmp_path: Path, content: bytes) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(content)
    report = validated(tmp_path, upload)
    assert (report.usable_rows, report.error_count) == (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PREPARE_FILE, REPORT_FILE, "upload"])


def test_rows_that_the_template_refuses_fail_the_job_with_their_numbers(tmp_path: Path, model: Path) -> None:
    strict = tmp_path / "model"
    strict.mkdir()
    for path in model.iterdir():
        (strict / path.name).write_bytes(path.read_bytes())
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusing + (model / "chat_template.jinja").read_text())
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = tmp_path / ROWS_FILE
    system = {"role": "system", "content": "s"}
    rows.write_text("".join(json.dumps({"row": n, "messages": [system] * (n > 4) + turns}) + "\n" for n in (2, 4, 6, 9)))
    code, said = finish(start(tmp_path, tokenize(tmp_path, strict, rows)))
    assert code == Reason.BAD_DATA.facts.exit_code
    last = said.strip().splitlines()[-1]
    assert "2 of 4 rows can't be rendered" in last
    assert "row 6" in last
    assert "row 9" in last
    assert "no system role" in last
    assert not (tmp_path / TOKENS_FOLDER).exists()


def test_rows_that_all_lose_their_target_leave_an_empty_cache(tmp_path: Path, model: Path) -> None:
    validated(tmp_path, EXAMPLES / "alpaca_seed_en.jsonl")
    code, _ = finish(start(tmp_path, tokenize(tmp_path, model, tmp_path / ROWS_FILE, max_length=8)))
    assert code == 0
    counts = read_counts(tmp_path)
    assert (counts.rows, counts.tokens, counts.rows_without_target) == (175, 0, 175)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
BAD = {"role": "assistant", "content": "b"}
ROWS_OF: dict[str, dict[str, Any]] = {
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "preference_alpaca": {"instruction": "q", "chosen": "a", "rejected": "b"},
    "preference_sharegpt": {"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": {"from": "gpt", "value": "b"}},
    "preference_openai": {"input": {"messages": CHAT[:1]}, "preferred_output": CHAT[1:], "non_preferred_output": [BAD]},
    "alpaca": {"instruction": "q", "output": "a"},
    "sharegpt": {"conversations": SHARE},
    "messages": {"messages": CHAT},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "preference_implicit": {"chosen": CHAT, "rejected": [CHAT[0], BAD]},
    "text": {"text": "q a"},
}
SEEN = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
LEARNED = {
    "conversation": [[(SEEN, False), ("a<|im_end|>", True), ("\n", False)]],
    "preference": [[(SEEN, False), (f"{answer}<|im_end|>", True), ("\n", False)] for answer in "ab"],
    "text": [[("q", False), (" a<|im_end|>", True)]],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_labels_of_every_format_reach_the_cache_as_they_are_shown(tmp_path: Path, model: Path, name: str) -> None:
    upload = tmp_path / "upload.jsonl"
    upload.write_text(json.dumps(ROWS_OF[name]) + "\n")
    prepare_rows(ValidateInput(upload=upload, filename=upload.name), tmp_path)
    report = DatasetReport.model_validate_json((tmp_path / REPORT_FILE).read_bytes())
    kind = FORMATS[name].kind
    assert (report.format, report.kind, report.usable_rows, report.warning_count) == (name, kind, 1, 0)

    prepare_tokens(tokenize(tmp_path, model, tmp_path / ROWS_FILE, data_kind=kind), tmp_path)
    cache = TokenCache.open(tmp_path / TOKENS_FOLDER)
    assert (len(cache), cache.group, cache.facts["data_kind"]) == (1, len(LEARNED[kind]), kind)
    tokenizer = Tokenizer.from_folder(model)
    shown = [visualize(Rendered(ids.tolist(), mask.tolist()), tokenizer) for ids, mask in cache.example(0)]
    assert shown == LEARNED[kind]


def test_what_a_row_weighs_reaches_the_mask(tmp_path: Path, model: Path) -> None:
    upload = tmp_path / "upload.jsonl"
    weighed = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1] | {"weight": 1}]
    upload.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (weighed, weighed[:2])))
    prepare_rows(ValidateInput(upload=upload, filename=upload.name), tmp_path)
    first, second = (json.loads(line) for line in (tmp_path / ROWS_FILE).read_text().splitlines())
    assert [message.get("weight") for message in first["messages"]] == [None, 0, None, None]
    assert second == {"row": 2, "messages": weighed[:2]}
    prepare_tokens(tokenize(tmp_path, model, tmp_path / ROWS_FILE), tmp_path)
    counts = read_counts(tmp_path)
    assert (counts.rows, counts.examples, counts.rows_without_target) == (2, 1, 1)
    ids, mask = TokenCache.open(tmp_path / TOKENS_FOLDER).row(0)
    assert [
        text for text, trained in visualize(Rendered(ids.tolist(), mask.tolist()), Tokenizer.from_folder(model)) if trained
    ] == ["a<|im_end|>"]


def test_texts_go_on_in_further_examples_and_lose_nothing(tmp_path: Path, model: Path) -> None:
    texts = ["The quick brown fox. " * 40, "short", "What is the capital of France? " * 7]
    upload = tmp_path / "upload.jsonl"
    upload.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = validated(tmp_path, upload)
    assert (report.usable_rows, report.kind) == (3, "text")
    request = tokenize(tmp_path, model, tmp_path / ROWS_FILE, data_kind="text", train_on="everything", max_length=32)
    code, said = finish(start(tmp_path, request))
    assert (code, said) == (0, "")
    counts = read_counts(tmp_path)
    cache = TokenCache.open(tmp_path / TOKENS_FOLDER)
    tokenizer = Tokenizer.from_folder(model)
    whole = [len(tokenizer.encode(text, parse_special=False)[0]) + 1 for text in texts]
    assert (counts.rows, counts.truncated_rows, counts.rows_without_target, counts.longest) == (3, 0, 0, 32)
    assert counts.examples == len(cache) == sum(math.ceil((length - 1) / 31) for length in whole) > 3
    assert counts.trained_tokens == sum(whole) - 3
    for row, text in enumerate(texts, 1):
        pieces = [cache.row(place)[0].tolist() for place in range(len(cache)) if cache.row_numbers[place] == row]
        ids = [*pieces[0], *(token for piece in pieces[1:] for token in piece[1:])]
        assert tokenizer.decode(ids, skip_special=False) == text + "<|im_end|>"


def test_rows_of_another_kind_than_the_job_trains_on_fail_it(tmp_path: Path, model: Path) -> None:
    rows = tmp_path / ROWS_FILE
    rows.write_text(json.dumps({"row": 3, "text": "x"}) + "\n")
    code, said = finish(start(tmp_path, tokenize(tmp_path, model, rows)))
    assert code == Reason.BAD_DATA.facts.exit_code
    assert "row 3 is of kind text, not conversation" in said.strip().splitlines()[-1]


def test_the_child_dies_with_its_supervisor(tmp_path: Path) -> None:
    upload = tmp_path / "upload.jsonl"
    line = json.dumps({"prompt": "q" * 100, "completion": "a" * 100}) + "\n"
    with upload.open("w") as file:
        for _ in range(400_000):
            file.write(line)
    child = start(tmp_path, ValidateInput(upload=upload, filename="upload.jsonl"))
    partial = tmp_path / f"{ROWS_FILE}.partial"
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.stdin
    assert child.stdout
    assert child.stderr
    child.stdin.close()
    assert child.wait(timeout=60) not in (0, 1)
    child.stdout.close()
    child.stderr.close()
    assert not (tmp_path / REPORT_FILE).exists()


def test_the_child_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, core.prepare; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def pictures(work: Path, tmp_path: Path, processor: dict[str, object] | None) -> PicturesInput:
    """What asks for the pictures of upload and rows under `tmp_path`, for a model with such a processor."""
    folder = work / "model"
    folder.mkdir(parents=True)
    if processor is not None:
        (folder / "processor_config.json").write_text(
            json.dumps({"image_processor": processor, "processor_class": "CLIPProcessor"})
        )
    rows = tmp_path / ROWS_FILE
    return PicturesInput(dataset_id="ds_1", upload=tmp_path / "upload", rows=rows, model_folder=folder)


def test_an_archive_goes_from_upload_to_pictures_at_a_models_size(tmp_path: Path) -> None:
    members = {f"{number}.png": saved(noise(number)) for number in range(4)}
    named = [
        {"image": "0.png", "captions": ["a"]},
        {"image": "2.png", "captions": ["b", "c"]},
        {"image": "gone.png", "captions": ["d"]},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in named).encode()
    report = validated(tmp_path, write_zip(tmp_path / "upload", {**members, "metadata.jsonl": lines}))
    assert (report.kind, report.rows, report.usable_rows, report.pictures) == ("picture_pair", 3, 2, 2)
    kept = [json.loads(line) for line in (tmp_path / ROWS_FILE).read_text().splitlines()]
    assert kept == [{"row": 1, "image": "0.png", "captions": ["a"]}, {"row": 2, "image": "2.png", "captions": ["b", "c"]}]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PREPARE_FILE, REPORT_FILE, ROWS_FILE, "upload"])

    processor: dict[str, object] = {"size": {"shortest_edge": 8}, "crop_size": 8, "do_center_crop": True}
    work = tmp_path / "work"
    assert finish(start(work, pictures(work, tmp_path, processor))) == (0, "")
    cache = PictureCache.open(work / PICTURES_FOLDER)
    assert cache.rows.tolist() == [[1, 0], [2, 1]]
    assert [cache.picture(index).shape for index in range(len(cache))] == [(8, 8, 3)] * 2
    assert cache.facts["dataset"] == "ds_1"


def test_pictures_that_can_not_be_had_fail_the_job_with_their_names(tmp_path: Path) -> None:
    write_zip(tmp_path / "upload", {"a.png": b"text"})
    (tmp_path / ROWS_FILE).write_text('{"row": 1, "images": ["a.png", "b.png"], "messages": []}\n')
    wanted = (
        ({"size": 8}, Reason.BAD_DATA, ["ds_1: a.png: not a picture", "b.png: not in the archive"]),
        ({"size": {"longest_edge": 8}}, Reason.BAD_SPEC, ["model: size: ['longest_edge'] is no way"]),
        (None, Reason.BAD_SPEC, ["model: the model has no image processor"]),
    )
    for number, (processor, reason, words) in enumerate(wanted):
        work = tmp_path / str(number)
        code, said = finish(start(work, pictures(work, tmp_path, processor)))
        assert code == reason.facts.exit_code
        assert all(word in said.splitlines()[-1] for word in words), said
        assert not (work / PICTURES_FOLDER).exists()
