"""From the logits of one position to the next token.

Every request draws from its own generator on the CPU, so what it gets depends on its seed alone: neither on the requests
beside it nor on the device.
"""

from dataclasses import dataclass
from typing import Any

import torch

from core.errors import StropError


class GenerationFailed(StropError):
    """The engine could not go on with a request; the message reaches the caller."""


@dataclass(frozen=True)
class Sampling:
    """How one answer is made. `temperature` 0 is greedy; `top_p` is nucleus sampling (arXiv 1904.09751)."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator: Any = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> tuple[int, float]:
        """(token, its log-probability in nats) from the logits [V] of one position.

        The log-probability is the model's own, before temperature and top_p. Raises GenerationFailed when the logits hold
        NaN or +inf: whatever was drawn from them would look like an answer.
        """
        table = torch.log_softmax(logits.float(), dim=-1)
        if bool(torch.isnan(table).any()):
            raise GenerationFailed("the model's logits are not finite numbers")
        token = int(table.argmax()) if self._temperature == 0 else self._draw(table.cpu().double())
        return token, float(table[token])

    def _draw(self, table: torch.Tensor) -> int:
        # Shifted first: divided by a tiny temperature all but the best become -inf, and nothing becomes NaN.
        probabilities = torch.softmax((table - table.max()) / self._temperature, dim=-1)
        if self._top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            keep = ordered.cumsum(0) - ordered < self._top_p
            keep[0] = True
            probabilities = torch.zeros_like(probabilities).scatter(0, order[keep], ordered[keep])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
