"""Adapters in host memory, on their way to a GPU: a bounded number of bytes, from which the longest unused leave.

Who leaves is read again from its folder when it is asked, on a thread of its own: steps of others go on, and its requests stand
aside as those do whose adapter is being copied. What is read again is what was checked before, or it isn't used: the folder's
digest is made anew.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Content:
    """An adapter as it is copied to the GPU: `pages` [n, elements of a page], `counts` int32 [sites], `gains` fp32 [outputs]."""

    pages: torch.Tensor
    counts: torch.Tensor
    gains: torch.Tensor | None

    @property
    def bytes(self) -> int:
        """What it takes of memory: torch has pinned memory in pieces of powers of two."""
        tensors = (self.pages, self.counts) if self.gains is None else (self.pages, self.counts, self.gains)
        return sum(1 << (one.nbytes - 1).bit_length() if one.is_pinned() else one.nbytes for one in tensors)


@dataclass(eq=False)
class Staged:
    """An adapter wherever it is: `pages` of the GPU it needs, its content in host memory or None, `read` to have it again.

    How often it was copied to the GPU and read into host memory, and how often it had to leave either for another, is counted
    since it was first read. `holders` are requests that are being answered.
    """

    pages: int
    content: Content | None
    read: Callable[[], Content]
    is_resident: bool = False
    loads: int = 0
    evictions: int = 0
    host_loads: int = 1
    host_evictions: int = 0
    holders: int = 0
    reading: Future[Content] | None = None
    """Under way, or failed."""

    @property
    def is_lost(self) -> bool:
        """Whether it couldn't be read again."""
        return self.reading is not None and self.reading.done() and self.reading.exception() is not None


class HostMemory:
    """Safe to use from several threads."""

    def __init__(self, gib: float) -> None:
        """`gib` is the room; the adapter that was read last has it in any case."""
        self._room = int(gib * 2**30)
        self._lock = threading.Lock()
        self._here: OrderedDict[Staged, int] = OrderedDict()  # bytes of each, the longest unused first
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def keep(self, staged: Staged) -> None:
        """Its content has been read: others leave where there is not room for all."""
        with self._lock:
            self._keep(staged)

    def find(self, staged: Staged) -> Content | None:
        """What is copied to the GPU now; None where it is being read, or lost. Never waits for a file."""
        with self._lock:
            if staged.content is not None:
                self._here.move_to_end(staged)
            elif staged.reading is None:
                staged.reading = self._reader.submit(self._read, staged)
            return staged.content

    def wait(self, staged: Staged) -> Content:
        """The same, for who must have it now. Raises what reading does."""
        while (content := self.find(staged)) is None:
            if (reading := staged.reading) is not None:
                return reading.result()
        return content

    def forget(self, staged: Staged) -> None:
        """It is served no longer."""
        with self._lock:
            self._here.pop(staged, None)
            staged.content = staged.reading = None

    def _read(self, staged: Staged) -> Content:
        try:
            content = staged.read()
        except Exception as error:
            logger.error("an adapter that is served can't be read again: %s", error)
            raise  # to the requests that ask it
        with self._lock:
            if staged.reading is not None:  # else it was forgotten meanwhile
                staged.content, staged.reading = content, None
                staged.host_loads += 1
                self._keep(staged)
        return content

    def _keep(self, staged: Staged) -> None:
        assert staged.content is not None
        self._here[staged] = staged.content.bytes
        while len(self._here) > 1 and sum(self._here.values()) > self._room:
            leaving, _ = self._here.popitem(last=False)
            # A copy that is under way keeps its memory: torch gives pinned memory away again behind what reads it.
            leaving.content = None
            leaving.host_evictions += 1
