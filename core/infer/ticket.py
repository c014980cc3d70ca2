"""A request in the engine: what it asks, how far it is, and who is told."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from core.infer.pages import chain_root
from core.infer.progress import End, Progress, Token
from core.infer.runner import Context
from core.infer.sampling import Drawing, Drawn, GenerationFailed, Sampling
from core.infer.servable import Servable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failed:
    """Delivered instead of an End when an answer can't be finished."""

    message: str


Item = Token | End | Failed


class Ticket:
    """`cancel` takes effect before the next token; nothing is delivered from then on."""

    def __init__(
        self,
        servable: Servable,
        prompt_ids: list[int],
        sampling: Sampling,
        deliver: Callable[[Item], None],
        *,
        tenant: str,
    ) -> None:
        self.servable = servable
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.is_running = False
        self.is_cancelled = False
        self.is_done = False
        self.progress = Progress(prompt_ids, sampling, servable.tokenizer, servable.stop_ids)
        digest = servable.weights.digest if servable.weights is not None else ""
        root = chain_root(tenant, servable.host.identity.model_dump_json(), digest)
        self.context = Context(list(prompt_ids), servable.weights, [root])
        self._deliver = deliver

    @property
    def group(self) -> Hashable:
        return id(self.servable)

    @property
    def is_packed(self) -> bool:
        """Whether packed steps can answer it; else peft does, one request after another."""
        return self.cost <= self.servable.packed_tokens

    @property
    def cost(self) -> int:
        return len(self.prompt_ids) + self.sampling.max_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose keys and values were there already."""
        return min(self.context.shared, len(self.prompt_ids))

    def cancel(self) -> None:
        self.is_cancelled = True

    @property
    def can_go_on_unread(self) -> bool:
        """Whether it may take part in a step before its last token is read: that is not the last of all, and the next one's
        chances don't ask which it is."""
        made = len(self.context.ids) - len(self.prompt_ids)
        return made < self.sampling.max_tokens and not self.sampling.asks_back

    def drawing(self) -> Drawing:
        """What its next token is drawn with."""
        return self.progress.drawing(self.context.unknown)

    def tell(self, drawn: Drawn) -> None:
        """The token that its context took: tell the reader, and end where the answer ends."""
        try:
            for item in self.progress.push(drawn):
                self.deliver(item)
        except GenerationFailed as error:
            self.fail(str(error))

    def fail(self, message: str) -> None:
        self.deliver(Failed(message))

    def deliver(self, item: Item) -> None:
        """An End or a Failed is the last."""
        self.is_done = self.is_done or not isinstance(item, Token)
        if self.is_cancelled:
            return
        try:
            self._deliver(item)
        except Exception:
            # The reader is gone (its event loop closed); that must not take the engine along.
            logger.exception("an answer could not be delivered")
            self.cancel()
