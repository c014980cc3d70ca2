"""The formats a dataset may have. A new one is a file beside this one and a line here.

A row is of the first format whose required fields it has, so what asks for more stands before what asks for less.
"""

from core.data.formats import (
    alpaca,
    messages,
    preference,
    preference_alpaca,
    preference_openai,
    preference_sharegpt,
    prompt_completion,
    sharegpt,
    text,
)
from core.data.formats.format import Format

FORMATS: dict[str, Format] = {
    "preference": preference.FORMAT,
    "preference_alpaca": preference_alpaca.FORMAT,
    "preference_sharegpt": preference_sharegpt.FORMAT,
    "preference_openai": preference_openai.FORMAT,
    "alpaca": alpaca.FORMAT,
    "sharegpt": sharegpt.FORMAT,
    "messages": messages.FORMAT,
    "prompt_completion": prompt_completion.FORMAT,
    "preference_implicit": preference.IMPLICIT,
    "text": text.FORMAT,
}

__all__ = ["FORMATS", "Format"]
