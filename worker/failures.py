"""From the way a child ended to the reason and the sentence the user reads.

The exit code decides, the child's last event and the end of its output give the words. A death by signal 9 alone proves no
lack of memory. Nothing of this machine's folders gets into a message.
"""

import re
import signal

from core.events import Ended
from core.states import EXIT_REASONS, Reason

_FOLDERS = re.compile(r"(?<![\w/:])(?:/[^/\s'\"]+)+/(?=[^/\s'\"])")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Warning|Memory)\b")
_MESSAGE_LIMIT = 500


def judge(exit_code: int, ended: Ended | None, output: str, *, asked_to_stop: bool) -> tuple[Reason, str]:
    """(reason, message) of a child that was not cancelled. FINISHED still needs a verified result."""
    reason = EXIT_REASONS.get(exit_code, Reason.INTERNAL_ERROR)
    if reason is Reason.DRAINED and not asked_to_stop:
        return Reason.INTERNAL_ERROR, "The training process stopped without having been asked to."
    if ended is not None and ended.reason is reason and ended.message:
        return reason, tidy(ended.message)
    if exit_code < 0:
        return reason, f"The training process was ended by {_signal_name(exit_code)}."
    if reason is Reason.FINISHED:
        return reason, reason.facts.sentence
    last = last_error(output)
    if reason is Reason.INTERNAL_ERROR:
        return reason, f"The training process ended with exit code {exit_code}" + (f": {last}" if last else ".")
    return reason, last or reason.facts.sentence


def last_line(output: str) -> str:
    """The last line of output, without folders: where a preparing child says what the user can mend."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return tidy(lines[-1]) if lines else ""


def last_error(output: str) -> str:
    """The last line of output that reads like an exception, else the last line at all; without folders."""
    errors = [line.strip() for line in output.splitlines() if _EXCEPTION.match(line.strip())]
    return tidy(errors[-1]) if errors else last_line(output)


def tidy(message: str) -> str:
    """A message fit for a user: no folders of the machine, no NUL (Postgres has no place for it), not endless."""
    short = _FOLDERS.sub("", message.replace("\0", "�"))
    return short if len(short) <= _MESSAGE_LIMIT else short[: _MESSAGE_LIMIT - 1] + "…"


def _signal_name(exit_code: int) -> str:
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
