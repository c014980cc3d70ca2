"""The engine: one thread that answers requests one after another, first come, first served.

Simple on purpose: no batching. All that touches a model (answers, loading, measuring) happens on this thread; work from
other threads runs between two tokens, so a long answer does not hold up a deployment. Walk of a request: the endpoint
submits prompt ids and gets tokens delivered until an End or a Failed.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.data.conversation import Message
from core.data.render import render_prompt, stop_ids
from core.data.template import choose_template
from core.data.tokenizer import Tokenizer
from core.errors import NotFound, Unavailable
from core.infer.adapters import AdaptedBase
from core.infer.generate import End, Token, check_room, generate
from core.infer.sampling import GenerationFailed, Sampling

T = TypeVar("T")
logger = logging.getLogger(__name__)


class QueueFull(Unavailable):
    """So many requests wait already that another one is not taken."""


class Servable:
    """What a request can be answered by: weights, perhaps with an adapter, and the way to talk to them."""

    def __init__(self, host: AdaptedBase, adapter: str | None, folder: Path) -> None:
        """`folder` holds tokenizer and chat template: an adapter speaks as it was trained to, not as its base does."""
        self.host = host
        self.adapter = adapter
        self.tokenizer = Tokenizer.from_folder(folder)
        self.template = choose_template("model", self.tokenizer)
        self.stop_ids = stop_ids(self.tokenizer, self.template)
        self.context_length = int(host.model.config.max_position_embeddings)
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


@dataclass(frozen=True)
class Failed:
    """Delivered instead of an End when an answer can't be finished."""

    message: str


Item = Token | End | Failed


class Ticket:
    """A request in the engine. `cancel` takes effect before its next token; nothing is delivered from then on."""

    def __init__(self, servable: Servable, prompt_ids: list[int], sampling: Sampling, deliver: Callable[[Item], None]) -> None:
        self.servable = servable
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.deliver = deliver
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Engine:
    """Starts its thread at once; `close` ends it."""

    def __init__(self, *, max_waiting: int = 64) -> None:
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._retiring: list[tuple[Servable, Callable[[], None]]] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, servable: Servable, prompt_ids: list[int], sampling: Sampling, deliver: Callable[[Item], None]) -> Ticket:
        """Queue a request. `deliver` is called on the engine's thread and must return at once.

        Raises InvalidInput when prompt and max_tokens exceed the context, NotFound when `servable` was retired meanwhile,
        QueueFull, and Unavailable after `close`.
        """
        check_room(len(prompt_ids), sampling.max_tokens, servable.context_length)
        ticket = Ticket(servable, prompt_ids, sampling, deliver)
        with self._changed:
            if self._is_closed:
                raise Unavailable("The endpoint is stopping")
            if servable.is_retired:
                raise NotFound("The model is served no longer")
            waiting = sum(not other.is_cancelled for other in self._waiting)
            if waiting >= self._max_waiting:
                raise QueueFull(f"{waiting} requests wait already")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the engine's thread, between two tokens, and return what it returns or raises."""
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                raise Unavailable("The endpoint is stopping")
            self._calls.append((work, future))
            self._changed.notify_all()
        return future.result()

    def retire(self, servable: Servable, work: Callable[[], None]) -> None:
        """Take no more requests for `servable`, and run `work` on the engine's thread once the last one is answered."""
        with self._changed:
            servable.is_retired = True
            self._retiring.append((servable, work))
            self._changed.notify_all()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> int:
        """Requests running or waiting."""
        with self._changed:
            return len(self._waiting) + (self._running is not None)

    def close(self) -> None:
        """Stop before the next token; what runs or waits fails."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._calls or self._waiting or self._idle_ones())
                if self._is_closed:
                    break
            self._work_between()
            with self._changed:
                self._running = self._waiting.popleft() if self._waiting else None
                ticket = self._running
            if ticket is not None:
                self._answer(ticket)
                with self._changed:
                    self._running = None
        for _, future in self._calls:
            future.set_exception(Unavailable("The endpoint is stopping"))
        for ticket in self._waiting:
            _deliver(ticket, Failed("the endpoint is stopping"))

    def _answer(self, ticket: Ticket) -> None:
        servable = ticket.servable
        try:
            tokens = generate(servable.host.model, ticket.prompt_ids, ticket.sampling, servable.tokenizer, servable.stop_ids)
            while not ticket.is_cancelled:
                if self._is_closed:
                    raise GenerationFailed("the endpoint is stopping")
                servable.host.activate(servable.adapter)
                item = next(tokens)
                _deliver(ticket, item)
                if isinstance(item, End):
                    return
                self._work_between()
        except GenerationFailed as error:
            _deliver(ticket, Failed(str(error)))
        except torch.OutOfMemoryError:
            logger.exception("out of memory on an answer to %d prompt tokens", len(ticket.prompt_ids))
            _deliver(ticket, Failed("the endpoint ran out of memory for this request"))
        except Exception:
            # The one request fails; the thread must outlive it, or every later request would wait for ever.
            logger.exception("an answer failed")
            _deliver(ticket, Failed("the engine failed on this request"))

    def _work_between(self) -> None:
        while True:
            with self._changed:
                if not self._calls:
                    break
                work, future = self._calls.popleft()
            try:
                future.set_result(work())
            except BaseException as error:  # handed to the caller of `call`, whole
                future.set_exception(error)
        with self._changed:
            idle = self._idle_ones()
            self._retiring = [entry for entry in self._retiring if entry not in idle]
        for _, finish in idle:
            try:
                finish()
            except Exception:
                logger.exception("a retired version could not be taken out of memory")

    def _idle_ones(self) -> list[tuple[Servable, Callable[[], None]]]:
        used = {id(ticket.servable) for ticket in [*self._waiting, *([self._running] if self._running else [])]}
        return [entry for entry in self._retiring if id(entry[0]) not in used]


def _deliver(ticket: Ticket, item: Item) -> None:
    if ticket.is_cancelled:
        return
    try:
        ticket.deliver(item)
    except Exception:
        # The reader is gone (its event loop closed); that must not take the engine along.
        logger.exception("an answer could not be delivered")
        ticket.cancel()
