"""The text of one answer as it grows: whole characters only, and nothing at or behind a stop string (nothing behind it, where
it is to be part of the text).

What may be the beginning of a stop string is held back until the next tokens decide.
"""

from core.data.tokenizer import TextStream, Tokenizer


class Answer:
    """Ids in, text that may be shown out. `is_stopped` turns true once a stop string is complete.

    The text of the first `min_tokens` tokens is not searched for stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], *, include_stop: bool = False, min_tokens: int = 0) -> None:
        self._stream = TextStream(tokenizer)
        self._stop = stop
        self._include_stop = include_stop
        self._unsearched = min_tokens
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that this token made certain; "" when nothing."""
        piece = self._stream.push(token)
        if self._unsearched > 0:
            self._unsearched -= 1
            return piece
        return self._release(piece)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        released = self._release(self._stream.finish())
        left, self._held = self._held, ""
        return released + left

    def _release(self, piece: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + piece
        found = [(at, at + len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            begin, end = min(found)
            return text[: end if self._include_stop else begin]
        keep = self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
