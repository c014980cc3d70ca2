"""Where datasets, checkpoints and adapters lie: a local folder or an S3 bucket, under the same keys.

A folder is published with its manifest last, so a reader that finds the manifest finds everything. On a local storage a
run's finished folder is moved, not copied; on S3 it is uploaded and fetched into a local cache when needed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from core.manifest import MANIFEST, read_manifest

_CHUNK = 1 << 20


def upload_key(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/upload"


def rows_key(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/rows.jsonl"


def tokens_key(dataset_id: str, key: str) -> str:
    return f"datasets/{dataset_id}/tokens/{key}"


def pictures_key(dataset_id: str, key: str) -> str:
    return f"datasets/{dataset_id}/pictures/{key}"


def log_key(job_id: str, attempt: int) -> str:
    return f"jobs/{job_id}/{attempt}/log"


def adapter_key(sha256: str) -> str:
    return f"adapters/{sha256}"


class Storage:
    """Files by key. `cache` is a local folder for what has to be fetched from a remote storage."""

    def __init__(self, url: str, cache: Path) -> None:
        self._cache = cache
        self._local: Path | None = None if "://" in url else Path(url).absolute()
        if self._local is not None:
            self._fs, self._root = fsspec.filesystem("file"), str(self._local)
        else:
            self._fs, self._root = fsspec.core.url_to_fs(url)

    def put_file(self, source: Path, key: str, *, move: bool = False) -> None:
        """Store a file whole or not at all."""
        if self._local is None:
            self._fs.put_file(str(source), self._path(key))
            if move:
                source.unlink()
            return
        final = self._local / key
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=".put-")
        os.close(handle)
        temporary = Path(name)
        try:
            if move:
                shutil.move(source, temporary)
            else:
                shutil.copyfile(source, temporary)
            temporary.chmod(0o640)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(final)
        finally:
            temporary.unlink(missing_ok=True)

    def publish_folder(self, folder: Path, key: str) -> None:
        """Store a closed folder and remove the local one. A folder that already stands under the key is left as it is."""
        files = [*read_manifest(folder)["files"], MANIFEST]
        if self.exists(f"{key}/{MANIFEST}"):
            shutil.rmtree(folder)
            return
        if self._local is not None:
            final = self._local / key
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(final, ignore_errors=True)
            if os.stat(folder).st_dev == os.stat(final.parent).st_dev:
                folder.rename(final)
                return
            temporary = final.parent / f".{final.name}.{os.getpid()}"
            shutil.copytree(folder, temporary)
            temporary.rename(final)
        else:
            for name in files:
                self._fs.put_file(str(folder / name), self._path(f"{key}/{name}"))
        shutil.rmtree(folder)

    def fetch_folder(self, key: str) -> Path:
        """A closed folder on the local disk. Raises FileNotFoundError. The caller verifies it against its manifest."""
        if self._local is not None:
            if not (self._local / key / MANIFEST).is_file():
                raise FileNotFoundError(key)
            return self._local / key
        target = self._cache / key
        if not (target / MANIFEST).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=target.parent))
            self._fs.get_file(self._path(f"{key}/{MANIFEST}"), str(temporary / MANIFEST))
            for name in read_manifest(temporary)["files"]:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(self._path(f"{key}/{name}"), str(temporary / name))
            try:
                temporary.rename(target)
            except OSError:  # another process fetched the same content first
                shutil.rmtree(temporary)
        return target

    def fetch_file(self, key: str, into: Path) -> Path:
        """A file on the local disk: the stored one itself, or a copy at `into`. Raises FileNotFoundError."""
        if self._local is not None:
            path = self._local / key
            if not path.is_file():
                raise FileNotFoundError(key)
            return path
        into.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(self._path(key), str(into))
        return into

    def read_range(self, key: str, offset: int, limit: int) -> bytes:
        """Up to `limit` bytes from `offset`; empty when the file does not exist or is shorter."""
        try:
            with self._open(key) as file:
                file.seek(offset)
                return file.read(limit)
        except FileNotFoundError:
            return b""

    def folder_files(self, key: str) -> list[str]:
        """Names in a published folder, manifest included. Raises FileNotFoundError."""
        with self._open(f"{key}/{MANIFEST}"):
            pass
        names = self._fs.find(self._path(key))
        root = self._path(key).rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in names)

    def read_chunks(self, key: str) -> Iterator[bytes]:
        """A file in 1 MiB pieces. Raises FileNotFoundError."""
        with self._open(key) as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def size(self, key: str) -> int:
        return int(self._fs.size(self._path(key)))

    def exists(self, key: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path(key)))

    def delete(self, key: str) -> None:
        """Remove a file or folder; nothing there is no error. The manifest goes first, so no reader takes a half for a whole."""
        self._fs.invalidate_cache()
        if self._fs.exists(self._path(f"{key}/{MANIFEST}")):
            self._fs.rm_file(self._path(f"{key}/{MANIFEST}"))
        if self._fs.exists(self._path(key)):
            self._fs.rm(self._path(key), recursive=True)

    def _open(self, key: str) -> BinaryIO:
        return cast(BinaryIO, self._fs.open(self._path(key), "rb"))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"
