"""How far an answer is: from each drawn token to what its reader is told. The same for the packed path and the reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from core.data.tokenizer import Tokenizer
from core.infer.answer import Answer
from core.infer.sampling import Drawing, Drawn, GenerationFailed, Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is what became certain with it, which may be nothing, or reach back to earlier tokens.

    The token that ends a turn is among them, with its log-probability and no text, unless the request asked for it. `top` are
    (id, log-probability) of the likeliest tokens, as many as the request asked for.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class End:
    """Always the last. `text` is what had been held back for a stop string or character that did not complete."""

    reason: FinishReason
    text: str


class Progress:
    """`generated` are the ids of the answer so far."""

    def __init__(self, prompt_ids: list[int], sampling: Sampling, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        """`stop_ids` are those of the chat template."""
        self.generated: list[int] = []
        self._prompt_ids = prompt_ids
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._ending_ids = sampling.ending_ids(stop_ids)
        self._seed = sampling.resolved_seed()
        self._answer = Answer(tokenizer, sampling.stop, include_stop=sampling.include_stop, min_tokens=sampling.min_tokens)

    def drawing(self, unknown: int = 0) -> Drawing:
        """What its next token is drawn with, behind so many that are drawn and not read yet."""
        return Drawing.at(self._sampling, self._seed, self._prompt_ids, self.generated, self._stop_ids, unknown)

    def push(self, drawn: Drawn) -> Iterator[Token | End]:
        """Its next token, and an End where that was the last. Raises GenerationFailed for logits that are no numbers."""
        if not drawn.is_finite:
            raise GenerationFailed("the model's logits are not finite numbers")
        self.generated.append(drawn.token)
        is_ending = drawn.token in self._ending_ids
        text = "" if is_ending and not self._sampling.include_stop else self._answer.push(drawn.token)
        yield Token(drawn.token, text, drawn.logprob, drawn.top)
        if is_ending:
            yield End("stop", self._answer.finish())
        elif self._answer.is_stopped:
            yield End("stop", "")
        elif len(self.generated) == self._sampling.max_tokens:
            left = self._answer.finish()
            yield End("stop" if self._answer.is_stopped else "length", left)
