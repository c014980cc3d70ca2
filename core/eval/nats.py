"""Cross-entropy of a causal LM on the positions that carry loss, and on no others.

The decoder runs over whole rows; the output head, whose logits are the largest tensor of small models, runs only over the
positions whose next token is trained on. Softmax and loss are in fp32. Where even those logits are many they are made
chunk by chunk, and again in the backward pass, so that no more than one chunk is ever held.
"""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from core.eval.rows import MicroBatch

LOGITS_PER_CHUNK = 1 << 26
"""256 MiB in fp32."""


def trained_nats(model: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats fp32 [N], sequence int64 [N]): the loss of each of the batch's N trained tokens, and the sequence it stands in.

    `model` is a causal LM of transformers, with or without peft, whose head is applied to the decoder's last hidden state
    as in every family of the catalogue. A packed batch needs the attention of `core.models.documents`.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    packed = {} if batch.documents is None else batch.documents.attention_arguments()
    hidden = causal_lm.get_decoder()(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
    wanted = hidden.flatten(0, 1).index_select(0, batch.place)
    nats = _head_nats(causal_lm.get_output_embeddings(), wanted, batch.labels, causal_lm.config)
    return nats, batch.sequence


def _head_nats(head: Any, hidden: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
    own = getattr(head, "nats", None)  # a fused head's (core.train.fused.head)
    if own is not None and torch.is_grad_enabled():
        fused: torch.Tensor = own(hidden, labels)
        return fused
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2's (arXiv 2408.00118)

    def nats_of(part: torch.Tensor, part_labels: torch.Tensor) -> torch.Tensor:
        logits = head(part)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return cross_entropy(logits.float(), part_labels, reduction="none")

    rows = max(1, LOGITS_PER_CHUNK // config.vocab_size)
    if len(labels) <= rows or not torch.is_grad_enabled():
        parts = [nats_of(h, y) for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)]
    else:
        parts = [
            checkpoint(nats_of, h, y, use_reentrant=False, preserve_rng_state=False)
            for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
    return torch.cat(parts)
