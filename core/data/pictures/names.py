"""The pictures of an archive by name, and which of them a row means. A name is compared with members; no file is opened.

A row's name is looked for beside the annotation file, then from the archive's root, then as the end of a member's name, where
only one ends so: COCO's files name pictures without their folder, and a folder packed whole puts its own name before all.
"""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

from core.data.conversation import json_type
from core.data.strict_json import shown
from core.errors import Problem

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:|[a-z]:[/\\]", re.IGNORECASE)
"""Also one with a drive letter."""


class PictureNames:
    """`refused` holds every file of the archive that a row may mean: its name, and why it can't be used or None. `folder` is
    where the annotation file lies. `used` gathers what `find` found."""

    def __init__(self, refused: Mapping[str, str | None], folder: str = "") -> None:
        self._refused = refused
        self._folder = folder
        self._by_last: dict[str, list[str]] = {}
        for name in refused:
            self._by_last.setdefault(posixpath.basename(name).lower(), []).append(name)
        self.used: set[str] = set()

    def find(self, given: Any, where: str, problems: list[Problem]) -> str:
        """The member that a row means by the value at its field path `where`. A problem is added where there is none."""
        found = ""
        if not isinstance(given, str):
            problems.append(Problem("wrong-type", f"expected a picture's name, found {json_type(given)}", field=where))
        elif not given.strip():
            problems.append(Problem("missing-image", "an empty name", field=where))
        elif _ADDRESS.match(given) or given.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", given):
            message = f"{shown(given)} points out of the archive; name a picture inside it"
            problems.append(Problem("image-ref", message, field=where))
        else:
            matches = self._matches(posixpath.normpath(given.replace("\\", "/")))
            if len(matches) == 1:
                found = matches[0]
                self.used.add(found)
                if (reason := self._refused[found]) is not None:
                    problems.append(Problem("bad-image", reason, field=where))
            elif matches:
                message = f"{shown(given)} may be {shown(matches[0])} or {shown(matches[1])}; name it with its folder"
                problems.append(Problem("image-ref", message, field=where))
            else:
                problems.append(Problem("missing-image", f"{shown(given)} is not in the archive{self._hint(given)}", field=where))
        return found

    def _matches(self, name: str) -> list[str]:
        for whole in (posixpath.join(self._folder, name), name):
            if whole in self._refused:
                return [whole]
        return [member for member in self._by_last.get(posixpath.basename(name).lower(), ()) if member.endswith(f"/{name}")]

    def _hint(self, given: str) -> str:
        near = self._by_last.get(posixpath.basename(given).lower())
        return f"; did you mean {shown(near[0])}?" if near else ""
