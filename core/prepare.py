"""The preparer's child: `python -m core.prepare WORK_DIR` reads prepare.json and leaves what `core/run.py` names.

`validate` turns an upload (a file of rows, or an archive of pictures) into report.json and rows.jsonl; `tokenize` turns
rows.jsonl into the token cache and counts.json; `pictures` brings the pictures that rows name to a model's size. It runs
without torch, network or database, and dies with its supervisor: the end of stdin ends it.

What stands in an upload never fails it: a bad file is a report and exit code 0. Rows that a job's chat template refuses
are the job's failure, and so are new tokens it can't have: exit code 12 (bad_data) or 11 (bad_spec), the reasons on stderr, the
last line fit for the user.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread

from core.data.captions import check_caption_tokens, render_caption
from core.data.conversation import Parsed, PicturePair, PlainText, Preference, images_of, kind_of
from core.data.findings import Findings
from core.data.pictures.archive import is_archive, read_archive
from core.data.pictures.cache import write_picture_cache
from core.data.pictures.resize import ResizeRule
from core.data.pictures.validate import validate_pictures
from core.data.render import Rendered, check_new_tokens, render, render_preference, render_text
from core.data.rows import read_row, write_row
from core.data.template import ChatTemplate, choose_template
from core.data.tokenizer import Tokenizer
from core.data.tokens import TokenRow, write_token_cache
from core.data.validate import validate
from core.errors import BadData, BadSpec, InvalidInput, RunError, Unparsable
from core.model_folder import context_length, tokenizer_digest
from core.run import (
    COUNTS_FILE,
    PICTURES_FOLDER,
    RENDERER_VERSION,
    REPORT_FILE,
    ROWS_FILE,
    TOKENS_FOLDER,
    PicturesInput,
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
        elif isinstance(request, TokenizeInput):
            prepare_tokens(request, work_dir)
        else:
            prepare_pictures(request, work_dir)
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

        def keep(number: int, parsed: Parsed) -> None:
            rows.write(write_row(number, parsed))

        if is_archive(request.upload):
            report = validate_pictures(request.upload, work_dir, keep)
        else:
            report = validate(request.upload, request.filename, keep)
    if report.usable_rows:
        partial.replace(work_dir / ROWS_FILE)
    else:
        partial.unlink()
    _write_whole(work_dir / REPORT_FILE, report.model_dump_json())


def prepare_tokens(request: TokenizeInput, work_dir: Path) -> None:
    """Leave tokens/ and counts.json; the counts come last.

    Raises BadData when the template refuses rows, BadSpec for new tokens that tokenizer or template can't have.
    """
    tokenizer = Tokenizer.from_folder(request.model_folder, request.new_tokens)
    template = choose_template(request.template, tokenizer)
    check_new_tokens(tokenizer, template)
    longest, kept_end = request.max_length, 0
    if request.data_kind == "picture_pair":
        check_caption_tokens(tokenizer, request.model_folder.name)
        reads = context_length(json.loads((request.model_folder / "config.json").read_text(encoding="utf-8")))
        longest, kept_end = min(longest, reads), 1
    facts = {
        "renderer": RENDERER_VERSION,
        "tokenizer": tokenizer_digest(request.model_folder),
        "template": template.name,
        "template_digest": template.digest,
        "max_length": longest,
        "data_kind": request.data_kind,
        "train_on": request.train_on,
        "new_tokens": request.new_tokens,
    }
    rows = _rendered(request, tokenizer, template)
    group = 2 if request.data_kind == "preference" else 1
    counts = write_token_cache(work_dir / TOKENS_FOLDER, request.dataset_id, rows, longest, facts, group, kept_end)
    _write_whole(work_dir / COUNTS_FILE, counts.model_dump_json())


def prepare_pictures(request: PicturesInput, work_dir: Path) -> None:
    """Leave pictures/.

    Raises BadData with the pictures that can't be had, BadSpec for a model whose processor can't be followed.
    """
    try:
        rule = ResizeRule.of_model(request.model_folder)
    except InvalidInput as error:
        reasons = [f"{problem.field}: {problem.message}" if problem.field else problem.message for problem in error.problems]
        raise BadSpec(f"{request.model_folder.name}: {'; '.join(reasons) or error.detail}") from None
    named: list[tuple[int, str]] = []
    with request.rows.open(encoding="utf-8", newline="\n") as lines:
        for number, parsed in map(read_row, lines):
            named += [(number, name) for name in images_of(parsed)]
    findings = Findings()
    try:
        members = read_archive(request.upload, findings)
        write_picture_cache(work_dir / PICTURES_FOLDER, members, named, rule, {"dataset": request.dataset_id})
    except (InvalidInput, Unparsable) as error:
        raise BadData(f"{request.dataset_id}: {error.detail}") from None


def _rendered(request: TokenizeInput, tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[TokenRow]:
    """Every row rendered. Raises BadData after the last row, so that it can name how many were refused."""
    refused: list[str] = []
    rows = count = 0
    with request.rows.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            number, parsed = read_row(line)
            if kind_of(parsed) != request.data_kind:
                raise BadData(f"{request.dataset_id}: row {number} is of kind {kind_of(parsed)}, not {request.data_kind}")
            rows += 1
            try:
                sequences = _sequences(parsed, request, tokenizer, template)
            except InvalidInput as error:
                count += 1
                if len(refused) < _NAMED_REFUSALS:
                    refused.append(f"row {number}: {error.detail}")
                continue
            for rendered in sequences:
                yield TokenRow(number, rendered.ids, rendered.mask)
    if count:
        more = f"; and {count - len(refused)} more" if count > len(refused) else ""
        raise BadData(f"{request.dataset_id}: {count} of {rows} rows can't be rendered: {'; '.join(refused)}{more}")


def _sequences(parsed: Parsed, request: TokenizeInput, tokenizer: Tokenizer, template: ChatTemplate) -> Sequence[Rendered]:
    """The sequences of one row. Raises InvalidInput."""
    if isinstance(parsed, Preference):
        return render_preference(parsed, tokenizer, template)
    if isinstance(parsed, PlainText):
        return render_text(parsed, tokenizer, request.max_length)
    if isinstance(parsed, PicturePair):
        return [render_caption(caption, tokenizer) for caption in parsed.captions]
    if not isinstance(parsed, list):
        raise InvalidInput(f"rows of the kind {kind_of(parsed)} are not made of tokens alone")
    return [render(parsed, tokenizer, template, request.train_on)]


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
