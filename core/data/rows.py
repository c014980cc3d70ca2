"""rows.jsonl: the usable rows of an upload as their format read them, one JSON object a line.

{"row": n, "messages": [...]}, {"row": n, "prompt": [...], "chosen": {...}, "rejected": {...}} or {"row": n, "text": "..."},
n being the row of the upload, from 1. A message is {"role", "content"}, and "weight" where that is not 1. Of pictures
{"row": n, "image": "...", "captions": [...]}, {"row": n, "image": "...", "question": "...", "answers": [...]} or
{"row": n, "images": [...], "messages": [...]}, by the names of the archive's members. The preparer writes it when it
validates and reads it for each way to tokenise; both in `core.prepare`.
"""

import json
from typing import Any

from core.data.conversation import Message, Parsed, PictureChat, PicturePair, PictureQuestion, PlainText, Preference


def write_row(number: int, parsed: Parsed) -> str:
    """The line, with its line end."""
    entry: dict[str, Any] = {"row": number}
    if isinstance(parsed, PlainText | PicturePair | PictureQuestion):
        entry |= parsed._asdict()
    elif isinstance(parsed, PictureChat):
        entry |= {"images": parsed.images, "messages": [_plain(message) for message in parsed.messages]}
    elif isinstance(parsed, Preference):
        entry["prompt"] = [_plain(message) for message in parsed.prompt]
        entry |= {"chosen": _plain(parsed.chosen), "rejected": _plain(parsed.rejected)}
    else:
        entry["messages"] = [_plain(message) for message in parsed]
    return json.dumps(entry, ensure_ascii=False) + "\n"


def read_row(line: str) -> tuple[int, Parsed]:
    """(number in the upload, row) of a line that `write_row` wrote."""
    entry = json.loads(line)
    if "text" in entry:
        return entry["row"], PlainText(entry["text"])
    if "prompt" in entry:
        prompt = [Message(**message) for message in entry["prompt"]]
        return entry["row"], Preference(prompt, Message(**entry["chosen"]), Message(**entry["rejected"]))
    if "captions" in entry:
        return entry["row"], PicturePair(entry["image"], entry["captions"])
    if "question" in entry:
        return entry["row"], PictureQuestion(entry["image"], entry["question"], entry["answers"])
    messages = [Message(**message) for message in entry["messages"]]
    return entry["row"], PictureChat(entry["images"], messages) if "images" in entry else messages


def _plain(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    return plain if message.weight == 1 else plain | {"weight": message.weight}
