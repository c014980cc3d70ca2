"""Log-probabilities a model gives to a known sequence: the yardstick of the parity record.

The training child measures a finished result with this function and writes the numbers beside the weights; the endpoint
calls the same function on what it has loaded and compares. No autocast, no batch, no padding: what is left is the model.
"""

from typing import Any

import torch


@torch.inference_mode()
def sequence_logprobs(model: Any, token_ids: list[int], start: int) -> list[float]:
    """log p(token_ids[i] | token_ids[:i]) in nats for i = start .. len - 1, the softmax taken in fp32.

    `model` is a causal LM of transformers, with or without peft, already in eval mode, in its own dtype. `start` ≥ 1, since
    nothing precedes the first token.
    """
    if not 1 <= start < len(token_ids):
        raise ValueError(f"start {start} is not within 1 .. {len(token_ids) - 1}")
    ids = torch.tensor([token_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
    table = torch.log_softmax(logits.float(), dim=-1)
    chosen = table.gather(1, ids[0, start:, None]).squeeze(1)
    values: list[float] = chosen.tolist()
    return values
