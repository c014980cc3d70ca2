"""The requests of one base, step by step: schedule, run, draw, deliver. What fails fails alone.

A step that raises is taken apart: each of its requests is run by itself, and the one that raises there too is failed; the
others go on from where they were, since a step that did not end has moved nothing.
"""

import logging

import torch

from core.infer.runner import Runner, Share
from core.infer.sampling import draw
from core.infer.schedule import Scheduler
from core.infer.ticket import Ticket

logger = logging.getLogger(__name__)


class Lane:
    def __init__(self, runner: Runner, *, running: int, tokens: int) -> None:
        """At most `running` requests at once and `tokens` tokens a step."""
        self._runner = runner
        self.schedule: Scheduler[Ticket] = Scheduler(runner, running=running, tokens=tokens)

    def step(self) -> None:
        """One step of whoever has a turn."""
        taken = self.schedule.shares()
        if not taken:
            return
        try:
            logits = self._runner.step([share for _, share in taken])
        except Exception as error:
            if len(taken) == 1:
                self._fail(taken[0][0], error)
            else:
                logger.warning("a step of %d requests failed (%s); they are run one by one", len(taken), error)
                for ticket, share in taken:
                    self._alone(ticket, share)
            return
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
        ready = [number for number, ticket in enumerate(tickets) if not ticket.context.left]
        if not ready:
            return
        asked = [tickets[number] for number in ready]
        for ticket, drawn in zip(asked, draw(logits[ready], [ticket.progress.drawing() for ticket in asked]), strict=True):
            ticket.push(drawn)
            if ticket.is_done:
                self.schedule.leave(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        is_memory = isinstance(error, torch.OutOfMemoryError)
        logger.error("a request of %d tokens failed", len(ticket.context.ids), exc_info=error)
        ticket.fail("the endpoint ran out of memory for this request" if is_memory else "the engine failed on this request")
        self.schedule.leave(ticket)
