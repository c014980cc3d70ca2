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
from core.infer.sampling import Drawing, GenerationFailed, Sampling, draw

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

    Ends at an id of `stop_ids` or of the request, at a stop string, or after `max_tokens`. Raises GenerationFailed.
    """
    seed, ending = sampling.resolved_seed(), sampling.ending_ids(stop_ids)
    answer = Answer(tokenizer, sampling.stop, include_stop=sampling.include_stop, min_tokens=sampling.min_tokens)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt_ids], device=model.device)
    generated: list[int] = []
    while len(generated) < sampling.max_tokens:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        (drawn,) = draw(logits, [Drawing.at(sampling, seed, prompt_ids, generated, stop_ids)])
        if not drawn.is_finite:
            raise GenerationFailed("the model's logits are not finite numbers")
        generated.append(drawn.token)
        if drawn.token in ending:
            text = answer.push(drawn.token) if sampling.include_stop else ""
            yield Token(drawn.token, text, drawn.logprob, drawn.top)
            yield End("stop", answer.finish())
            return
        yield Token(drawn.token, answer.push(drawn.token), drawn.logprob, drawn.top)
        if answer.is_stopped:
            yield End("stop", "")
            return
        ids = torch.tensor([[drawn.token]], device=model.device)
    left = answer.finish()
    yield End("stop" if answer.is_stopped else "length", left)
