"""A published folder as one .tar.gz, streamed: the same folder gives the same bytes (no times, owners or random order)."""

import tarfile
import zlib
from collections.abc import Iterator

from store.files import Storage

_BLOCK = 512
_FASTEST = 1  # weights hardly shrink, and the download should not wait for the attempt


def stream_archive(storage: Storage, key: str, names: list[str], root: str) -> Iterator[bytes]:
    """The files `names` of the folder `key`, under `root/` in the archive. Raises FileNotFoundError at the first piece."""
    packer = zlib.compressobj(_FASTEST, zlib.DEFLATED, 16 + zlib.MAX_WBITS)  # 16: a gzip header, which then holds no time
    for name in sorted(names):
        size = storage.size(f"{key}/{name}")
        entry = tarfile.TarInfo(f"{root}/{name}")
        entry.size, entry.mode = size, 0o644
        yield packer.compress(entry.tobuf(tarfile.PAX_FORMAT))
        for piece in storage.read_chunks(f"{key}/{name}"):
            yield packer.compress(piece)
        yield packer.compress(bytes(-size % _BLOCK))
    yield packer.compress(bytes(2 * _BLOCK))
    yield packer.flush()
