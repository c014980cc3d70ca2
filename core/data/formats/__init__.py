"""The formats a dataset may have. A new one is a file beside this one and a line here."""

from core.data.formats import alpaca, messages, prompt_completion, sharegpt
from core.data.formats.format import Format

FORMATS: dict[str, Format] = {
    "alpaca": alpaca.FORMAT,
    "sharegpt": sharegpt.FORMAT,
    "messages": messages.FORMAT,
    "prompt_completion": prompt_completion.FORMAT,
}

__all__ = ["FORMATS", "Format"]
