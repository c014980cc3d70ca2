"""What the readers of zip and of tar hand to `archive`: an entry as it stands there, before it is judged or read."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from core.errors import Problem, Unparsable

EntryKind = Literal["file", "folder", "link", "device", "sparse file", "encrypted"]


class Entry(NamedTuple):
    """`size` is the declared number of bytes, `packed` those it takes in the archive, None where that is not known.

    `read` gives at most `size` bytes, and may be called until the next entry is asked for.
    """

    name: str
    kind: EntryKind
    size: int
    packed: int | None
    read: Callable[[], bytes]


def broken(reason: str) -> Unparsable:
    """What to raise where an archive can't be read on."""
    message = f"the archive can't be read: {reason}"
    return Unparsable(message, [Problem("broken-archive", message)])
