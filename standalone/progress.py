"""What a person sees in the terminal: lines, and one live line that is drawn over itself.

Where stdout is not a terminal (a log, a pipe) the live line becomes a plain line every few seconds.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

_PLAIN_LINE_SECONDS = 10.0
_CLEAR_TO_END = "\x1b[K"


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class LiveLine:
    """`show` replaces the line, `end` leaves the last one standing."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._last = ""
        self._shown = ""
        self._shown_at = 0.0

    def show(self, text: str) -> None:
        self._last = text
        if self._live:
            sys.stdout.write(f"\r{text}{_CLEAR_TO_END}")
            sys.stdout.flush()
        elif time.monotonic() - self._shown_at >= _PLAIN_LINE_SECONDS:
            self._write_plain()

    def end(self) -> None:
        if self._live and self._last:
            say()
        elif self._last != self._shown:
            self._write_plain()
        self._last = self._shown = ""

    def _write_plain(self) -> None:
        say(self._last)
        self._shown = self._last
        self._shown_at = time.monotonic()


def step_line(step: Mapping[str, Any], total_steps: int | None, peak_gib: float) -> str:
    """One step's values (names of core.events.Step) as a line of the same width from step to step."""
    total = "?" if total_steps is None else str(total_steps)
    return (
        f"  step {int(step['step']):>{len(total)}}/{total}   loss {step['loss']:6.3f}   "
        f"{step['tokens_per_second']:7.0f} tokens/s   peak {peak_gib:5.2f} GiB   ETA {clock(step['eta_seconds'])}"
    )


def memory_gib(step: Mapping[str, Any]) -> float:
    """The allocator's peak on a GPU, resident memory on a CPU."""
    peak = step.get("peak_allocated_gib")
    return float(step["rss_gib"] if peak is None else peak)


def clock(seconds: float) -> str:
    """75 -> `1:15`"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
