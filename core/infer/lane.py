"""The requests of one base, step by step: schedule, run, draw, deliver. What fails fails alone.

A step that raises is taken apart: each of its requests is run by itself, and the one that raises there too is failed; the
others go on from where they were, since a step that did not end has moved nothing. The same with the drawing of tokens.

On a GPU readers are told of a token, which means decoding it and looking for stop strings, while the next step runs already; an
answer that turns out to have ended then leaves what that step made of it. What ends by its number of tokens or by an id is
told at once.
"""

import logging
import time
from collections.abc import Sequence

import torch

from core.infer.runner import Runner, Share
from core.infer.sampling import Drawn, draw
from core.infer.schedule import Scheduler
from core.infer.ticket import Ticket

logger = logging.getLogger(__name__)

_ASIDE_SECONDS = 0.0005


class Lane:
    def __init__(self, runner: Runner, *, running: int, tokens: int) -> None:
        """At most `running` requests at once and `tokens` tokens a step."""
        self._runner = runner
        self.schedule: Scheduler[Ticket] = Scheduler(runner, running=running, tokens=tokens)
        self._untold: list[tuple[Ticket, Drawn]] = []

    def step(self) -> None:
        """One step of whoever has a turn. Raises nothing: what can't be laid at one request's door fails all that run."""
        try:
            self._step()
        except Exception as error:
            for ticket in list(self.schedule.running):
                self._fail(ticket, error)

    def _step(self) -> None:
        taken = self.schedule.shares()
        if not taken:
            self._tell_all()
            if self.schedule.has_aside:
                time.sleep(_ASIDE_SECONDS)  # to look again at once would take Python from the thread that reads the adapter
            return
        try:
            logits = self._runner.step([share for _, share in taken])
        except Exception as error:
            self._tell_all()
            taken = [entry for entry in taken if not entry[0].is_done]
            if len(taken) == 1:
                self._fail(taken[0][0], error)
            else:
                logger.warning("a step of %d requests failed (%s); they are run one by one", len(taken), error)
                for ticket, share in taken:
                    self._alone(ticket, share)
            return
        self._tell_all()
        self._push([ticket for ticket, _ in taken], logits)

    def _alone(self, ticket: Ticket, share: Share) -> None:
        try:
            logits = self._runner.step([share])
        except Exception as error:
            self._fail(ticket, error)
        else:
            self._push([ticket], logits)

    def _push(self, tickets: list[Ticket], logits: torch.Tensor) -> None:
        # A prompt that is not read to its end has no next token yet.
        ready = [number for number, ticket in enumerate(tickets) if not (ticket.context.left or ticket.is_done)]
        if not ready:
            return
        asked = [tickets[number] for number in ready]
        for ticket, drawn in zip(asked, self._drawn(asked, logits if len(ready) == len(tickets) else logits[ready]), strict=True):
            if isinstance(drawn, Exception):
                self._fail(ticket, drawn)
                continue
            ticket.take(drawn)
            if self._runner.is_asynchronous and not ticket.progress.is_last(drawn):
                self._untold.append((ticket, drawn))
            else:
                self._tell(ticket, drawn)

    def _tell_all(self) -> None:
        untold, self._untold = self._untold, []
        for ticket, drawn in untold:
            self._tell(ticket, drawn)

    def _tell(self, ticket: Ticket, drawn: Drawn) -> None:
        try:
            ticket.tell(drawn)
        except Exception as error:
            self._fail(ticket, error)
        else:
            if ticket.is_done:
                self.schedule.leave(ticket)

    def _drawn(self, tickets: list[Ticket], logits: torch.Tensor) -> Sequence[Drawn | Exception]:
        drawings = [ticket.progress.drawing() for ticket in tickets]
        try:
            return draw(logits, drawings)
        except Exception as error:
            if len(tickets) == 1:
                return [error]
        return [self._drawn([ticket], logits[row : row + 1])[0] for row, ticket in enumerate(tickets)]

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        is_memory = isinstance(error, torch.OutOfMemoryError)
        logger.error("a request of %d tokens failed", len(ticket.context.ids), exc_info=error)
        ticket.fail("the endpoint ran out of memory for this request" if is_memory else "the engine failed on this request")
        self.schedule.leave(ticket)
