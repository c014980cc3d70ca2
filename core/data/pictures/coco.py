"""COCO's captions file, one object of lists, as rows: a row is an entry of `images` with all its captions.

{"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "caption", ...}], ...}. Rows count from 1 along `images`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.data.conversation import json_type
from core.data.findings import Findings
from core.data.reader import ARRAY_BYTES, Row
from core.data.strict_json import StrictJson, first_too_deep, shown, text_faults
from core.errors import Problem


def coco_rows(path: Path, findings: Findings) -> Iterator[Row | Problem] | None:
    """The rows, or None for a file that is something else. `findings` gets what belongs to no row."""
    value = _whole_object(path)
    if value is None or not (isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list)):
        return None
    return _rows(value["images"], value["annotations"], findings)


def _whole_object(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as file:
        raw = file.read(ARRAY_BYTES + 1)
    if not raw.lstrip().startswith(b"{") or len(raw) > ARRAY_BYTES:
        return None
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None  # the reader of rows says where
    if first_too_deep(text) is not None:
        return None
    strict = StrictJson()
    try:
        value, end = strict.decode(text, 0)
    except json.JSONDecodeError:
        return None
    return value if end == len(text) and isinstance(value, dict) and not strict.faults else None


def _rows(images: list[Any], annotations: list[Any], findings: Findings) -> Iterator[Row | Problem]:
    captions: dict[Any, list[Any]] = {}
    for image in images:
        if isinstance(image, dict) and isinstance(image.get("id"), int | str):
            captions.setdefault(image["id"], [])
    for index, annotation in enumerate(annotations):
        at = f"annotations[{index}]"
        if not isinstance(annotation, dict):
            findings.refuse(Problem("wrong-type", f"expected an object, found {json_type(annotation)}", field=at))
            continue
        owner = annotation.get("image_id")
        if not isinstance(owner, int | str) or owner not in captions:
            message = f"the image_id {shown(owner)} is of no entry of images"
            findings.refuse(Problem("unknown-image-id", message, field=f"{at}.image_id"))
        elif "caption" not in annotation:
            findings.refuse(Problem("missing-field", "caption is missing", field=f"{at}.caption"))
        else:
            captions[owner].append(annotation["caption"])
    seen: set[Any] = set()
    for number, image in enumerate(images, 1):
        at = f"images[{number - 1}]"
        if not isinstance(image, dict):
            yield Problem("wrong-type", f"expected an object, found {json_type(image)}", row=number, field=at)
            continue
        missing = [name for name in ("id", "file_name") if not isinstance(image.get(name), int | str)]
        if missing:
            yield Problem("missing-field", f"{' and '.join(missing)} missing or of a wrong type", row=number, field=at)
        elif image["id"] in seen:
            yield Problem("duplicate-id", f"the id {shown(image['id'])} stands twice in images", row=number, field=f"{at}.id")
        else:
            seen.add(image["id"])
            value = {"file_name": image["file_name"], "captions": captions[image["id"]]}
            fault = next(text_faults(value), None)
            if fault is not None:
                yield Problem("invalid-json-value", fault[1], row=number, field=fault[0])
            else:
                yield Row(number, None, value)
