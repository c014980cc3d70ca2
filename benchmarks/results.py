"""Result files: benchmarks/results/<benchmark>-<device>.json, one row per (case, metric), later runs replace earlier ones.

A number without its command, commit, date, device and versions is not a result, so `Results` writes them into every row.
"""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent / "results"
ROOT = FOLDER.parent.parent
_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


class Results:
    """Rows of one benchmark on one device; the file is rewritten after each row, so a cut run keeps what it measured."""

    def __init__(
        self,
        benchmark: str,
        device: str,
        *,
        folder: Path = FOLDER,
        commit: str | None = None,
        versions: dict[str, str] | None = None,
    ) -> None:
        """`commit` is for a copy of the tree that carries no history, `versions` for what runs in another environment."""
        self.path = folder / f"{benchmark}-{_slug(device)}.json"
        self._benchmark, self._device = benchmark, device
        self._facts = {
            "command": " ".join(["python", "-m", f"benchmarks.{benchmark}", *_asked()]),
            "commit": commit or _commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "device": device,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS}
            | {"python": platform.python_version()}
            | (versions or {}),
        }

    def add(
        self,
        case: str,
        metric: str,
        value: float,
        unit: str,
        *,
        better: Literal["higher", "lower"],
        n: int = 1,
        spread: float | None = None,
        must: float | None = None,
        aim: float | None = None,
    ) -> None:
        """Store one number. `spread` is half the distance of the quartiles over `n` repetitions."""
        row: dict[str, Any] = {"case": case, "metric": metric, "value": value, "unit": unit, "better": better}
        row |= {"must": must, "aim": aim, "n": n, "spread": spread} | self._facts
        rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        rows = [old for old in rows if (old["case"], old["metric"]) != (case, metric)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"benchmark": self._benchmark, "rows": rows}, indent=1) + "\n")
        print(f"{case:32} {metric:28} {value:12.3f} {unit}", flush=True)

    def curve_path(self, case: str) -> Path:
        """Where `curve` stores a case."""
        return self.path.parent / "curves" / f"{self.path.stem}-{case}.json"

    def curve(self, case: str, series: dict[str, Any]) -> None:
        """Store what a case measured step by step: lists of equal length, and what they belong to."""
        path = self.curve_path(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in (self._facts | {"case": case} | series).items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def text(self, case: str, text: str) -> Path:
        """Store what is for people to read, such as a profile, under what it belongs to; answers where."""
        path = self.path.parent / "profiles" / f"{self.path.stem}-{case}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = [f"{name}: {value}" for name, value in (self._facts | {"case": case}).items()]
        path.write_text("\n".join([*facts, "", text]))
        return path


def _asked() -> list[str]:
    """The arguments that decide what is measured: where its file goes is not one, nor where on a machine its inputs lie."""
    asked = [Path(argument).name if _is_place(argument) else argument for argument in sys.argv[1:]]
    for option in ("--out", "--commit", "--peer-python"):
        if option in asked:
            at = asked.index(option)
            del asked[at : at + 2]
    return asked


def _is_place(argument: str) -> bool:
    """A path of this machine; a case has slashes too."""
    return "/" in argument and (argument.startswith(("/", ".", "~")) or Path(argument).exists())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _commit() -> str:
    return subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True).strip()
