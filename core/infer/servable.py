"""What a request can be answered by: weights, perhaps with an adapter, and the way to talk to them."""

import threading
from collections.abc import Sequence
from pathlib import Path

from core.data.conversation import Message
from core.data.render import render_prompt, stop_ids
from core.data.template import choose_template
from core.data.tokenizer import Tokenizer
from core.infer.adapters import AdaptedBase
from core.infer.lora import LoraWeights


class Servable:
    """A base, a base with an adapter, or a full model. Immutable but for `is_retired`."""

    def __init__(
        self, host: AdaptedBase, folder: Path, *, weights: LoraWeights | None = None, adapter: str | None = None
    ) -> None:
        """`folder` holds tokenizer and chat template: an adapter speaks as it was trained to, not as its base does.

        `weights` is the adapter where packed steps can express it; `adapter` its name on `host` where only peft can.
        """
        self.host = host
        self.weights = weights
        self.adapter = adapter
        self.tokenizer = Tokenizer.from_folder(folder)
        self.template = choose_template("model", self.tokenizer)
        self.stop_ids = stop_ids(self.tokenizer, self.template)
        self.context_length = int(host.model.config.max_position_embeddings)
        # Most tokens of a request that is answered in packed steps, beside those of other adapters.
        self.packed_tokens = 0
        if host.runner is not None and adapter is None:
            self.packed_tokens = min(host.runner.reach, host.runner.kv_tokens)
            if host.runner.kv_tokens < host.runner.reach:
                self.context_length = host.runner.kv_tokens
        self.is_retired = False
        self._encoding = threading.Lock()

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of a plain text, whose special tokens are read as such, or of a conversation. Raises InvalidInput."""
        with self._encoding:  # the tokenizer's parse_special is a switch on the object
            if not isinstance(prompt, str):
                return render_prompt(prompt, self.tokenizer, self.template)
            ids, _ = self.tokenizer.encode(prompt, parse_special=True)
        if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None and ids[:1] != [self.tokenizer.bos_id]:
            ids.insert(0, self.tokenizer.bos_id)
        return ids
