"""One answer by the reference: prompt ids in, tokens with text and log-probability out. A generator; the caller decides when
to stop reading.

The forward passes are those of transformers' `generate` (the whole prompt, then one token at a time on the KV cache), so
greedy ids and log-probabilities are the same. It knows nothing of queues, adapters or chat.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from core.data.tokenizer import Tokenizer
from core.infer.progress import End, Progress, Token
from core.infer.sampling import Sampling, draw


@torch.inference_mode()
def generate(
    model: Any, prompt_ids: list[int], sampling: Sampling, tokenizer: Tokenizer, stop_ids: tuple[int, ...]
) -> Iterator[Token | End]:
    """Yield the tokens of an answer, then one End. `model` is a causal LM of transformers in eval mode.

    Ends at an id of `stop_ids` or of the request, at a stop string, or after `max_tokens`. Raises GenerationFailed.
    """
    if sampling.max_tokens < 1:
        yield End("length", "")
        return
    progress = Progress(prompt_ids, sampling, tokenizer, stop_ids)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt_ids], device=model.device)
    while True:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        (drawn,) = draw(logits, [progress.drawing()])
        for item in progress.push(drawn):
            yield item
            if isinstance(item, End):
                return
        ids = torch.tensor([[drawn.token]], device=model.device)
