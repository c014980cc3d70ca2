"""The preparer's child: `python -m core.prepare WORK_DIR` reads prepare.json and leaves what `core/run.py` names.

`validate` turns an upload into report.json and rows.jsonl; `tokenize` turns rows.jsonl into the token cache and
counts.json. It runs without torch, network or database, and dies with its supervisor: the end of stdin ends it.

What stands in an upload never fails it: a bad file is a report and exit code 0. Rows that a job's chat template refuses
are the job's failure: exit code 12 (bad_data), the reasons on stderr, the last line fit for the user.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from core.data.conversation import Message
from core.data.render import render
from core.data.template import ChatTemplate, choose_template
from core.data.tokenizer import Tokenizer
from core.data.tokens import TokenRow, write_token_cache
from core.data.validate import validate
from core.errors import BadData, InvalidInput, RunError
from core.model_folder import tokenizer_digest
from core.run import (
    COUNTS_FILE,
    RENDERER_VERSION,
    REPORT_FILE,
    ROWS_FILE,
    TOKENS_FOLDER,
    TokenizeInput,
    ValidateInput,
    read_prepare_input,
)

_NAMED_REFUSALS = 5
_ORPHANED = 3


def main(work_dir: Path) -> int:
    """Do what prepare.json asks for; returns the exit code."""
    Thread(target=_die_with_stdin, daemon=True).start()
    request = read_prepare_input(work_dir)
    try:
        if isinstance(request, ValidateInput):
            prepare_rows(request, work_dir)
        else:
            prepare_tokens(request, work_dir)
    except RunError as error:
        print(error, file=sys.stderr)  # noqa: T201  the supervisor reads it there
        code = error.reason.facts.exit_code
        assert code is not None
        return code
    return 0


def prepare_rows(request: ValidateInput, work_dir: Path) -> None:
    """Leave report.json and, where a row can be used, rows.jsonl; the report comes last."""
    partial = work_dir / f"{ROWS_FILE}.partial"
    with partial.open("w", encoding="utf-8", newline="\n") as rows:

        def keep(number: int, messages: list[Message]) -> None:
            plain = [{"role": role, "content": content} for role, content in messages]
            rows.write(json.dumps({"row": number, "messages": plain}, ensure_ascii=False) + "\n")

        report = validate(request.upload, request.filename, keep)
    if report.usable_rows:
        partial.replace(work_dir / ROWS_FILE)
    else:
        partial.unlink()
    _write_whole(work_dir / REPORT_FILE, report.model_dump_json())


def prepare_tokens(request: TokenizeInput, work_dir: Path) -> None:
    """Leave tokens/ and counts.json; the counts come last. Raises BadData when the template refuses rows."""
    tokenizer = Tokenizer.from_folder(request.model_folder)
    template = choose_template(request.template, tokenizer)
    facts = {
        "renderer": RENDERER_VERSION,
        "tokenizer": tokenizer_digest(request.model_folder),
        "template": template.name,
        "template_digest": template.digest,
        "max_length": request.max_length,
        "train_on": request.train_on,
    }
    rows = _rendered(request, tokenizer, template)
    counts = write_token_cache(work_dir / TOKENS_FOLDER, request.dataset_id, rows, request.max_length, facts)
    _write_whole(work_dir / COUNTS_FILE, counts.model_dump_json())


def _rendered(request: TokenizeInput, tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[TokenRow]:
    """Every row rendered. Raises BadData after the last row, so that it can name how many were refused."""
    refused: list[str] = []
    rows = count = 0
    with request.rows.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            entry = json.loads(line)
            messages = [Message(message["role"], message["content"]) for message in entry["messages"]]
            rows += 1
            try:
                rendered = render(messages, tokenizer, template, request.train_on)
            except InvalidInput as error:
                count += 1
                if len(refused) < _NAMED_REFUSALS:
                    refused.append(f"row {entry['row']}: {error.detail}")
                continue
            yield TokenRow(entry["row"], rendered.ids, rendered.mask)
    if count:
        more = f"; and {count - len(refused)} more" if count > len(refused) else ""
        raise BadData(f"{request.dataset_id}: {count} of {rows} rows can't be rendered: {'; '.join(refused)}{more}")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _die_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(_ORPHANED)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m core.prepare WORK_DIR")
    sys.exit(main(Path(sys.argv[1])))
