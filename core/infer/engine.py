"""The engine: one thread that answers all requests, a token each at a time.

Requests of one base run together in packed steps, whatever adapters they ask (`lane.py`); what packed steps can't express
is answered by peft, one request after another, a token between two steps. All that touches a model happens on this thread;
work from other threads runs between two steps, so a long answer does not hold up a deployment. Walk of a request: the
endpoint submits prompt ids and gets tokens delivered until an End or a Failed.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from core.errors import InvalidInput, NotFound, Problem, Unavailable
from core.infer.adapters import AdaptedBase
from core.infer.generate import generate
from core.infer.lane import Lane
from core.infer.progress import End, Token
from core.infer.sampling import GenerationFailed, Sampling
from core.infer.servable import Servable
from core.infer.ticket import Item, Ticket

T = TypeVar("T")
logger = logging.getLogger(__name__)

STEP_TOKENS, GPU_STEP_TOKENS = 512, 2048
"""Tokens of a step: more read prompts faster, and make those who wait for their next token wait longer. On a GPU 2,048 of an 8B
model are some 60 ms."""
RUNNING = 64
"""Requests that one base answers at once."""


class QueueFull(Unavailable):
    """So many requests wait already that another one is not taken."""


class Retired(NotFound):
    """The version left between being looked up and being asked."""


class Engine:
    """Starts its thread at once; `close` ends it."""

    def __init__(self, *, max_waiting: int = 64, step_tokens: int = STEP_TOKENS, running: int = RUNNING) -> None:
        """`max_waiting` requests may wait; `step_tokens` and `running` are the bounds of a base's steps."""
        self._max_waiting = max_waiting
        self._step_tokens = step_tokens
        self._most_running = running
        self._changed = threading.Condition()
        self._open: dict[Ticket, None] = {}  # what is neither done nor cancelled, the oldest first
        self._new: deque[Ticket] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._retiring: list[tuple[Servable, Callable[[], None]]] = []
        self._is_closed = False
        # The engine's thread alone touches these.
        self._lanes: dict[AdaptedBase, Lane] = {}
        self._alone: deque[Ticket] = deque()
        self._answering: tuple[Ticket, Iterator[Token | End]] | None = None  # the first of them
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        servable: Servable,
        prompt_ids: list[int],
        sampling: Sampling,
        deliver: Callable[[Item], None],
        *,
        tenant: str = "",
    ) -> Ticket:
        """Queue a request. `deliver` is called on the engine's thread and must return at once. What one tenant's prompts
        left in memory speeds up its own later ones alone.

        Raises InvalidInput when prompt and max_tokens exceed the context, Retired when `servable` was retired meanwhile,
        QueueFull, and Unavailable after `close`.
        """
        check_room(len(prompt_ids), sampling.max_tokens, servable.context_length)
        ticket = Ticket(servable, prompt_ids, sampling, deliver, tenant=tenant)
        with self._changed:
            if self._is_closed:
                raise Unavailable("The endpoint is stopping")
            if servable.is_retired:
                raise Retired("The model is served no longer")
            waiting = sum(not (other.is_running or other.is_cancelled) for other in self._open)
            if waiting >= self._max_waiting:
                raise QueueFull(f"{waiting} requests wait already")
            self._open[ticket] = None
            self._new.append(ticket)
            self._changed.notify_all()
        return ticket

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the engine's thread, between two steps, and return what it returns or raises."""
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
            return sum(not (ticket.is_done or ticket.is_cancelled) for ticket in self._open)

    def close(self) -> None:
        """Stop before the next token; what runs or waits fails."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._calls or self._open or self._idle_ones())
                if self._is_closed:
                    break
            self._work_between()
            self._take_in()
            for lane in self._lanes.values():
                lane.step()
            self._step_alone()
            self._sweep()
        for _, future in self._calls:
            future.set_exception(Unavailable("The endpoint is stopping"))
        for ticket in self._open:
            ticket.fail("the endpoint is stopping")

    def _take_in(self) -> None:
        with self._changed:
            new, self._new = self._new, deque()
        for ticket in new:
            host = ticket.servable.host
            if not ticket.is_packed:
                self._alone.append(ticket)
                continue
            if host not in self._lanes:
                assert host.runner is not None
                self._lanes[host] = Lane(host.runner, running=self._most_running, tokens=self._step_tokens)
            self._lanes[host].schedule.waiting.push(ticket)

    def _step_alone(self) -> None:
        """The next token of the oldest request that peft answers."""
        if not self._alone:
            return
        ticket = self._alone[0]
        servable = ticket.servable
        try:
            if self._answering is None or self._answering[0] is not ticket:
                ticket.is_running = True
                model, sampling = servable.host.model, ticket.sampling
                tokens = generate(model, ticket.prompt_ids, sampling, servable.tokenizer, servable.stop_ids)
                self._answering = ticket, tokens
            if not ticket.is_cancelled:
                servable.host.activate(servable.adapter)
                ticket.deliver(next(self._answering[1]))
        except GenerationFailed as error:
            ticket.fail(str(error))
        except torch.OutOfMemoryError:
            logger.exception("out of memory on an answer to %d prompt tokens", len(ticket.prompt_ids))
            ticket.fail("the endpoint ran out of memory for this request")
        except Exception:
            # The one request fails; the thread must outlive it, or every later request would wait for ever.
            logger.exception("an answer failed")
            ticket.fail("the engine failed on this request")
        if ticket.is_done or ticket.is_cancelled:
            self._alone.popleft()
            self._answering = None

    def _sweep(self) -> None:
        """Forget what has ended or has no reader any more."""
        # Looked at once: one that is cancelled meanwhile is still in its lane, and goes next time.
        with self._changed:
            gone = {ticket for ticket in self._open if ticket.is_done or ticket.is_cancelled}
        for lane in self._lanes.values():
            lane.schedule.drop_cancelled()
        self._alone = deque(ticket for ticket in self._alone if ticket not in gone)
        if self._answering is not None and self._answering[0] in gone:
            self._answering = None  # it holds keys and values
        with self._changed:
            self._open = {ticket: None for ticket in self._open if ticket not in gone}
            hosts = {ticket.servable.host for ticket in self._open}
        # A full model's lane holds the model; it comes again with the next request.
        for host in [host for host in self._lanes if host not in hosts]:
            del self._lanes[host]

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
        used = {id(ticket.servable) for ticket in self._open}
        return [entry for entry in self._retiring if id(entry[0]) not in used]


def check_room(prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raise InvalidInput (context-length-exceeded) unless prompt and answer fit into the context together."""
    if prompt_tokens + max_tokens > context_length:
        message = (
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}: "
            f"together more than the context of {context_length}"
        )
        raise InvalidInput(message, [Problem("context-length-exceeded", message, pointer="/max_tokens")])
