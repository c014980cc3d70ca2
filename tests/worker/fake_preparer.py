"""A preparing child that obeys the upload: `python -m tests.worker.fake_preparer WORK_DIR`.

The upload's text is a verb (`fine`, `pairs`, `empty`, `crash`, `hang`), for validation and, behind a slash, for tokenising.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from core.manifest import closed_folder
from core.records import DatasetReport, TokenCounts
from core.run import (
    COUNTS_FILE,
    REPORT_FILE,
    ROWS_FILE,
    TOKEN_CACHE_KIND,
    TOKENS_FOLDER,
    TokenizeInput,
    ValidateInput,
    read_prepare_input,
)


def main() -> None:
    work = Path(sys.argv[1])
    task = read_prepare_input(work)
    if isinstance(task, ValidateInput):
        validate(work, task)
    else:
        tokenize(work, task)


def validate(work: Path, task: ValidateInput) -> None:
    text = task.upload.read_text()
    verb = text.split("/")[0]
    obey(verb)
    usable = 0 if verb == "empty" else 3
    kind, name = ("preference", "preference") if verb == "pairs" else ("conversation", "alpaca")
    counts = {"rows": 3, "usable_rows": usable, "error_count": 0, "warning_count": 0}
    report = DatasetReport(format=name, kind=kind, errors=[], warnings=[], **counts)
    (work / REPORT_FILE).write_text(report.model_dump_json())
    (work / ROWS_FILE).write_text(json.dumps({"row": 1, "text": text}) + "\n")


def tokenize(work: Path, task: TokenizeInput) -> None:
    verb = json.loads(task.rows.read_text())["text"].split("/")[-1]
    obey(verb)
    counts = TokenCounts(
        dataset_id=task.dataset_id,
        rows=3,
        tokens=30,
        trained_tokens=0 if verb == "targetless" else 9,
        truncated_rows=0,
        rows_without_target=3 if verb == "targetless" else 0,
        longest=10,
    )
    with closed_folder(work / TOKENS_FOLDER, TOKEN_CACHE_KIND, {"data_kind": task.data_kind, "train_on": task.train_on}) as draft:
        (draft / "ids").write_text("1 2 3")
    (work / COUNTS_FILE).write_text(counts.model_dump_json())


def obey(verb: str) -> None:
    if verb == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif verb == "hang":
        time.sleep(3600)
    elif verb == "spec":
        print("BadSpec: the model has no such template", file=sys.stderr)  # noqa: T201
        sys.exit(11)


if __name__ == "__main__":
    main()
