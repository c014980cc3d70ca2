"""Facts about a model folder, read without loading a weight into memory and without torch.

A model folder is what `save_pretrained` writes: config.json, *.safetensors, tokenizer.json, tokenizer_config.json and perhaps
chat_template.jinja. Its weights digest goes over tensor names, dtypes, shapes and bytes in sorted order, so it does not
depend on how they are spread over files. Pickled weights are not read at all.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from core.catalog import FAMILIES
from core.errors import ArtifactError, InvalidInput, Problem

_HEADER_LIMIT = 100 << 20
_CHUNK = 1 << 22
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class ModelFacts(BaseModel):
    """What the registry holds about a base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    parameters: int
    weights: str
    tokenizer: str
    has_chat_template: bool
    context_length: int
    config: dict[str, Any]


def read_model_facts(folder: Path) -> ModelFacts:
    """Read a model folder. Raises InvalidInput with every reason why it can't be registered."""
    problems = [
        Problem("missing-file", f"{name} is missing")
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
        if not (folder / name).is_file()
    ]
    if not list(folder.glob("*.safetensors")):
        problems.append(Problem("missing-file", "there is no *.safetensors (pickled weights are never read)"))
    if problems:
        raise InvalidInput(f"{folder.name} is not a model folder", problems)
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InvalidInput(f"{folder.name}: architecture {architecture} is not known (known: {known})")
    weights, parameters = _weights_digest(folder)
    return ModelFacts(
        architecture=architecture,
        parameters=parameters,
        weights=weights,
        tokenizer=tokenizer_digest(folder),
        has_chat_template=_chat_template(folder) is not None,
        context_length=int(config.get("max_position_embeddings", 2048)),
        config=config,
    )


def tokenizer_digest(folder: Path) -> str:
    """Digest of every file that decides how text becomes ids, chat template included."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    return template if isinstance(template, str) else None


def _weights_digest(folder: Path) -> tuple[str, int]:
    """(hex digest, number of parameters) over all tensors of all safetensors files of a folder."""
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        start, header = _read_header(path)
        for name, entry in header.items():
            tensors[name] = (path, start, entry)
    digest = hashlib.sha256()
    parameters = 0
    for name in sorted(tensors):
        path, start, entry = tensors[name]
        begin, end = entry["data_offsets"]
        digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
        parameters += math.prod(entry["shape"])
        with path.open("rb") as file:
            file.seek(start + begin)
            left = end - begin
            while left > 0:
                piece = file.read(min(_CHUNK, left))
                if not piece:
                    raise ArtifactError(f"{path.name}: shorter than its header says")
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest(), parameters


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _HEADER_LIMIT:
            raise ArtifactError(f"{path.name}: not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(size))
        except ValueError:
            raise ArtifactError(f"{path.name}: not a safetensors file") from None
    header.pop("__metadata__", None)
    return 8 + size, header
