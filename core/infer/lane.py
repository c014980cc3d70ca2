"""The requests of one base, step by step: schedule, run, draw, deliver. What fails fails alone.

A step that raises is taken apart: each of its requests is run by itself, and the one that raises there too is failed; the
others go on from where they were, since a step that did not end has moved nothing. The same with the drawing of tokens.

On a GPU the lane runs a step ahead: the tokens of a step are read, and readers told, when the next one is launched, which takes
them from the device (`ahead.py`). An answer that turns out to have ended then leaves, and what the step under way makes
of it is dropped: its pages may be given to others at once, since what writes there next runs after that step. Tokens are
read first where a request's next one can't be drawn without (penalties), and where one is the last by its number.
"""

import logging
import time
from collections.abc import Sequence

import torch

from core.infer import ahead
from core.infer.runner import Runner, Share
from core.infer.sampling import Drawn, Draws, launch
from core.infer.schedule import Scheduler
from core.infer.ticket import Ticket

logger = logging.getLogger(__name__)

_ASIDE_SECONDS = 0.0005


class Lane:
    def __init__(self, runner: Runner, *, running: int, tokens: int) -> None:
        """At most `running` requests at once and `tokens` tokens a step."""
        self._runner = runner
        self.schedule: Scheduler[Ticket] = Scheduler(runner, running=running, tokens=tokens)
        self._unread: tuple[Sequence[Ticket], Draws] | None = None

    def step(self) -> None:
        """One step of whoever has a turn. Raises nothing: what can't be laid at one request's door fails all that run."""
        try:
            self._step()
        except Exception as error:
            for ticket in list(self.schedule.running):
                self._fail(ticket, error)

    def _step(self) -> None:
        if not self._can_run_ahead():
            self._read_all()
        taken = self.schedule.shares()
        if not taken:
            self._read_all()
            if self.schedule.has_aside:
                time.sleep(_ASIDE_SECONDS)  # to look again at once would take Python from the thread that reads the adapter
            return
        try:
            logits = self._runner.step([share for _, share in taken])
        except Exception as error:
            self._read_all()
            taken = [entry for entry in taken if not entry[0].is_done]
            if len(taken) == 1:
                self._fail(taken[0][0], error)
            else:
                logger.warning("a step of %d requests failed (%s); they are run one by one", len(taken), error)
                for ticket, share in taken:
                    self._alone(ticket, share)
            return
        self._draw([ticket for ticket, _ in taken], logits)

    def _alone(self, ticket: Ticket, share: Share) -> None:
        try:
            logits = self._runner.step([share])
        except Exception as error:
            self._fail(ticket, error)
        else:
            self._draw([ticket], logits)
            self._read_all()

    def _can_run_ahead(self) -> bool:
        if self._unread is None:
            return True
        tickets, _ = self._unread
        is_taken_along = self._runner.is_asynchronous and len(tickets) <= ahead.MOST
        return is_taken_along and all(ticket.can_go_on_unread or ticket.is_done for ticket in tickets)

    def _draw(self, tickets: list[Ticket], logits: torch.Tensor) -> None:
        """Launch the drawing of everyone's next token, and read those of the step before."""
        # A prompt that is not read to its end has no next token yet.
        ready = [number for number, ticket in enumerate(tickets) if not (ticket.context.left or ticket.is_done)]
        asked = [tickets[number] for number in ready]
        rows = logits if len(ready) == len(tickets) else logits[ready]
        draws = None
        if asked:
            try:
                into = self._runner.drawn if len(asked) <= ahead.MOST else None
                draws = launch(rows, [ticket.drawing() for ticket in asked], into)
            except Exception as error:
                logger.warning("drawing %d tokens failed (%s); they are drawn one by one", len(asked), error)
        self._read_all()
        if draws is not None:
            for row, ticket in enumerate(asked):
                ticket.context.take_mark(row)
            self._unread = (asked, draws)
            if not self._runner.is_asynchronous:
                self._read_all()
        else:
            for row, ticket in enumerate(asked):
                if not ticket.is_done:
                    self._draw_alone(ticket, rows[row : row + 1])

    def _draw_alone(self, ticket: Ticket, logits: torch.Tensor) -> None:
        try:
            (drawn,) = launch(logits, [ticket.drawing()]).read()
        except Exception as error:
            self._fail(ticket, error)
        else:
            ticket.context.take(drawn.token)
            self._tell(ticket, drawn)

    def _read_all(self) -> None:
        """Know what is drawn, and tell the readers."""
        if self._unread is None:
            return
        (tickets, draws), self._unread = self._unread, None
        for ticket, drawn in zip(tickets, draws.read(), strict=True):
            ticket.context.know(drawn.token)
            if not ticket.is_done:
                self._tell(ticket, drawn)

    def _tell(self, ticket: Ticket, drawn: Drawn) -> None:
        try:
            ticket.tell(drawn)
        except Exception as error:
            self._fail(ticket, error)
        else:
            if ticket.is_done:
                self.schedule.leave(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        is_memory = isinstance(error, torch.OutOfMemoryError)
        logger.error("a request of %d tokens failed", len(ticket.context.ids), exc_info=error)
        ticket.fail("the endpoint ran out of memory for this request" if is_memory else "the engine failed on this request")
        self.schedule.leave(ticket)
