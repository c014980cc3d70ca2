"""Pages: fixed pieces of memory in which the keys and values of running requests lie, and which of them may be shared.

A page holds so many tokens of one sequence. A full page keeps its content under a key after its last holder has left, until
the room is needed: a later prompt that begins with the same tokens takes it instead of computing it again. The key chains
everything that decides the numbers: who asks, the base, the adapter's digest, and every token up to the page's end
(`chain_root`), so that a new version of an adapter never meets what an older one wrote.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def chain_root(*parts: str) -> bytes:
    """The beginning of a chain of page keys: tenant, base identity, adapter digest. Parts can't run into one another."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.digest()


def chain_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a page with these tokens, behind the page (or root) with key `parent`."""
    return hashlib.blake2b(parent + np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=16).digest()


class Pages:
    """Who holds which page. Not the memory itself, and not safe for two threads: the engine's thread alone calls it."""

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        # Held by nobody, content kept; the longest unused first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill, the last one perhaps in part."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """So many pages with nothing in them; None, and nothing taken, when there are fewer."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def find(self, key: bytes) -> int | None:
        """The page with this key, held once more; None where no page has it."""
        page = self._page_of.get(key)
        if page is not None:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return page

    def publish(self, page: int, key: bytes) -> None:
        """The held page is full, and its content is that of `key`. Of two with one key the first is the one found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def give_back(self, pages: Sequence[int]) -> None:
        """A holder leaves. A page with a key is kept as long as nobody needs the room."""
        # The last first: when room is needed, the end of a chain goes before its beginning, without which it is lost.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
