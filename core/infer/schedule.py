"""Who takes part in the next step: answers that run go on, prompts are read in pieces, and new requests come in fairly.

Requests of one adapter wait behind each other; between adapters (the bare base is one) the room is shared by start-time fair
queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a request's turn comes when as much has been begun for every other adapter as
for its own, so a crowd at one adapter delays another's request by at most one request of each. Where memory runs out the
youngest answer steps back, and its tokens are computed anew when there is room.

On a GPU an adapter may have to be copied in first, or read: its requests stand aside until it is there, and others go on. Where
all that are there are being asked, nobody new begins until one's answers are finished: so the wait is at most that of the
answers that run.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from core.infer.runner import Context, Runner, Share


class Request(Protocol):
    """What is scheduled."""

    context: Context
    is_cancelled: bool
    is_running: bool

    @property
    def group(self) -> Hashable:
        """Requests of one group wait for each other: the adapter that is asked."""
        ...

    @property
    def cost(self) -> int:
        """Tokens it may come to."""
        ...


R = TypeVar("R", bound=Request)


class FairQueue(Generic[R]):
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, R]] = []
        self._arrivals = itertools.count()
        self._begun = 0  # virtual time: the start tag of the last request that left
        self._finish: dict[Hashable, int] = {}

    def push(self, request: R) -> None:
        start = max(self._begun, self._finish.get(request.group, 0))
        self._finish[request.group] = start + request.cost
        heapq.heappush(self._heap, (start, next(self._arrivals), request))

    def first(self) -> R | None:
        """The next in turn; cancelled ones leave unseen."""
        while self._heap and self._heap[0][2].is_cancelled:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> R:
        """Take the one that `first` showed."""
        self._begun, _, request = heapq.heappop(self._heap)
        if not self._heap:
            self._finish.clear()
            self._begun = 0
        return request


class Scheduler(Generic[R]):
    """At most `running` requests at once and `tokens` tokens a step."""

    def __init__(self, runner: Runner, *, running: int, tokens: int) -> None:
        self._runner = runner
        self._most_running = running
        self._most_tokens = tokens
        self.waiting: FairQueue[R] = FairQueue()  # not begun yet
        self._stepped_back: deque[R] = deque()
        self._aside: deque[R] = deque()  # their turn came, and their adapter is on its way
        self.running: list[R] = []  # the oldest first

    def leave(self, request: R) -> None:
        """It is done, or nobody waits for it any more. One that stepped back meanwhile has nothing to release."""
        if request in self.running:
            self.running.remove(request)
            self._runner.release(request.context)
        elif request in self._stepped_back:
            self._stepped_back.remove(request)

    def drop_cancelled(self) -> None:
        """Let go of what nobody waits for any more."""
        for request in [request for request in self.running if request.is_cancelled]:
            self.leave(request)
        self._stepped_back = deque(request for request in self._stepped_back if not request.is_cancelled)
        self._aside = deque(request for request in self._aside if not request.is_cancelled)

    @property
    def has_aside(self) -> bool:
        """Whether somebody's turn has come whose adapter is on its way."""
        return bool(self._aside)

    def shares(self) -> list[tuple[R, Share]]:
        """Reserve the next step, requests of one adapter side by side. Empty only when nothing is left to do."""
        self.drop_cancelled()
        room = self._most_tokens
        taken: list[tuple[R, Share]] = []
        before = len(self._stepped_back)  # it only grows until somebody is admitted
        # Answers before prompts: who reads along waits for the next token.
        for request in sorted(self.running, key=lambda request: request.context.left > 1):
            count = min(request.context.left, room)
            is_running = len(self._stepped_back) == before or request in self.running
            if count and is_running and self._make_room(request, count):
                taken.append((request, (request.context, count)))
                room -= count
        if len(self._stepped_back) > before:
            taken = [entry for entry in taken if entry[0] in self.running]
        while room and (new := self._admit()) is not None:
            count = min(new.context.left, room)
            taken.append((new, (new.context, count)))
            room -= count
        order = {id(request.context.weights): number for number, request in enumerate(reversed(self.running))}
        return sorted(taken, key=lambda entry: order[id(entry[0].context.weights)])

    def _make_room(self, request: R, count: int) -> bool:
        while not self._runner.reserve(request.context, count):
            youngest = self.running[-1]
            self._step_back(youngest)
            if youngest is request:
                return False
        return True

    def _step_back(self, request: R) -> None:
        self.leave(request)
        self._stepped_back.appendleft(request)

    def _admit(self) -> R | None:
        """The next request, with pages for all its tokens so far and one more; None when it must wait."""
        if len(self.running) >= self._most_running:
            return None
        request = self._next()
        if request is None:
            return None
        self._runner.begin(request.context)
        if not self._runner.reserve(request.context, request.context.left + 1):
            self._runner.release(request.context)
            self._aside.appendleft(request)
            return None
        if not request.is_running:
            request.context.shared = request.context.computed  # what one that stepped back finds may be its own
        self.running.append(request)
        request.is_running = True
        return request

    def _next(self) -> R | None:
        """Take the next in turn whose adapter is there: those that stepped back, those that stand aside, then the queue."""
        for line in (self._stepped_back, self._aside):
            for one in line:
                if self._runner.residence(one.context.weights) == "here":
                    line.remove(one)
                    return one
            if line and self._runner.residence(line[0].context.weights) == "no-room":
                return None
        while (request := self.waiting.first()) is not None:
            residence = self._runner.residence(request.context.weights)
            if residence == "no-room":
                return None
            self.waiting.pop()
            if residence == "here":
                return request
            self._aside.append(request)
        return None
