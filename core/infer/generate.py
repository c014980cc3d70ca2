"""One answer, token by token: prompt ids in, tokens with text and log-probability out. A generator; the caller decides when
to stop reading.

The forward passes are those of transformers' `generate` (the whole prompt, then one token at a time on the KV cache), so
greedy ids and log-probabilities are the same. It knows nothing of queues, adapters or chat.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache

from core.data.tokenizer import Tokenizer
from core.errors import InvalidInput, Problem
from core.infer.answer import Answer
from core.infer.sampling import Sampler, Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is what became certain with it, which may be nothing, or reach back to earlier tokens.

    The token that ends a turn is among them, with its log-probability and no text.
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class End:
    """Always the last. `text` is what had been held back for a stop string or character that did not complete."""

    reason: FinishReason
    text: str


def check_room(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raise InvalidInput (context-length-exceeded) unless prompt and answer fit into the context together."""
    if prompt_tokens + max_tokens > context_length:
        message = (
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}: "
            f"together more than the context of {context_length}"
        )
        raise InvalidInput(message, [Problem("context-length-exceeded", message, pointer="/max_tokens")])


@torch.inference_mode()
def generate(
    model: Any, prompt_ids: list[int], sampling: Sampling, tokenizer: Tokenizer, stop_ids: tuple[int, ...]
) -> Iterator[Token | End]:
    """Yield the tokens of an answer, then one End. `model` is a causal LM of transformers in eval mode.

    Ends at an id of `stop_ids`, at a stop string, or after `max_tokens`. Raises GenerationFailed.
    """
    sampler = Sampler(sampling)
    answer = Answer(tokenizer, sampling.stop)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt_ids], device=model.device)
    for _ in range(sampling.max_tokens):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token, logprob = sampler.choose(logits)
        if token in stop_ids:
            yield Token(token, "", logprob)
            yield End("stop", answer.finish())
            return
        yield Token(token, answer.push(token), logprob)
        if answer.is_stopped:
            yield End("stop", "")
            return
        ids = torch.tensor([[token]], device=model.device)
    left = answer.finish()
    yield End("stop" if answer.is_stopped else "length", left)
