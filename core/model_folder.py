"""Facts about a model folder, read without loading a weight into memory, without torch and without running its code.

A model folder is what `save_pretrained` writes: config.json, *.safetensors, tokenizer.json, tokenizer_config.json and perhaps
chat_template.jinja. Its weights digest goes over tensor names, dtypes, shapes and bytes in sorted order, so it does not
depend on how they are spread over files. Pickled weights are not read at all.

A model of an architecture that `core.catalog` doesn't know may bring its own code (`auto_map` in config.json names it). That
is an operator's decision, taken for the very bytes that lie in the folder then: their digest is kept with the facts, and
`verify_code` holds the folder to it before each use. A model of a known architecture never needs its own code, and never gets
to run it.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from core.catalog import FAMILIES, REMOTE_CODE, TWO_TOWERS
from core.errors import ArtifactError, InvalidInput, Problem

MODEL_KIND = "model"
"""`kind` in the manifest of a model folder that was made here."""

_HEADER_LIMIT = 100 << 20
_CHUNK = 1 << 22
_Tensors = dict[str, tuple[Path, int, dict[str, Any]]]
"""Name -> file, where its data begins, header entry."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Either says how a picture is resized and normalised; transformers 5 writes the first."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class ModelFacts(BaseModel):
    """What the registry holds about a base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    parameters: int
    weights: str
    tokenizer: str
    processor: str | None = None
    """Digest of the files that decide how a picture becomes pixels; None for a model without pictures."""
    has_chat_template: bool
    context_length: int
    config: dict[str, Any]
    allow_remote_code: bool = False


def read_model_facts(folder: Path, *, allow_remote_code: bool = False) -> ModelFacts:
    """Read a model folder. Raises InvalidInput with every reason why it can't be registered.

    `allow_remote_code` is the operator's word that the code in the folder may run; where none is needed it changes nothing.
    """
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
    if architecture in TWO_TOWERS and processor_digest(folder) is None:
        missing = Problem("missing-file", f"{architecture} needs one of {', '.join(PROCESSOR_FILES)}, and neither is there")
        raise InvalidInput(f"{folder.name} is not a model folder", [missing])
    needs_code = architecture not in FAMILIES and architecture not in TWO_TOWERS
    tensors = _read_tensors(folder)
    config.pop(REMOTE_CODE, None)
    if needs_code:
        _check_code(folder, config, architecture, allow_remote_code)
        config[REMOTE_CODE] = {"code": code_digest(folder), "shape": _stored_shape(tensors)}
    elif config.get("model_type") != (known := TWO_TOWERS.get(architecture) or FAMILIES[architecture]).name:
        message = f"model_type {config.get('model_type')} does not go with the architecture {architecture}"
        raise InvalidInput(f"{folder.name}: {message} ({known.name} does)")
    weights, parameters = _weights_digest(tensors)
    return ModelFacts(
        architecture=architecture,
        parameters=parameters,
        weights=weights,
        tokenizer=tokenizer_digest(folder),
        processor=processor_digest(folder) if architecture in TWO_TOWERS else None,
        has_chat_template=_chat_template(folder) is not None,
        context_length=context_length(config),
        config=config,
        allow_remote_code=needs_code,
    )


def context_length(config: dict[str, Any]) -> int:
    """Tokens that a model reads at most, by its config.json; ChatGLM says seq_length. Of two towers it is the texts'."""
    towers = TWO_TOWERS.get((config.get("architectures") or ["unknown"])[0])
    if towers is not None:
        return int((config.get("text_config") or {}).get("max_position_embeddings") or towers.text_length)
    return int(config.get("max_position_embeddings") or config.get("seq_length") or 2048)


def code_digest(folder: Path) -> str:
    """Digest of the Python files of a model folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def verify_code(folder: Path, config: dict[str, Any]) -> None:
    """Raise ArtifactError unless a model's own code is the one it was registered with; `config` is the registered one."""
    registered = config.get(REMOTE_CODE, {}).get("code")
    found = code_digest(folder)
    if found != registered:
        raise ArtifactError(f"{folder.name}: its Python files have the digest {found}, and {registered} was registered")


def tokenizer_digest(folder: Path) -> str:
    """Digest of every file that decides how text becomes ids, chat template included."""
    return _digest_of(folder, TOKENIZER_FILES)


def processor_digest(folder: Path) -> str | None:
    """Digest of every file that decides how a picture becomes pixels; None where there is none."""
    return _digest_of(folder, PROCESSOR_FILES) if any((folder / name).is_file() for name in PROCESSOR_FILES) else None


def _digest_of(folder: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
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


def _check_code(folder: Path, config: dict[str, Any], architecture: str, allow_remote_code: bool) -> None:
    """Raise InvalidInput unless a model of an unknown architecture can run by its own code, and may."""
    known = ", ".join(sorted({*FAMILIES, *TWO_TOWERS}))
    auto_map = config.get("auto_map")
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if not isinstance(named, str):
        raise InvalidInput(f"{folder.name}: architecture {architecture} is not known (known: {known})")
    file = named.rpartition(".")[0] + ".py"
    if not allow_remote_code:
        raise InvalidInput(
            f"{folder.name}: architecture {architecture} is not known, and the folder brings its own code ({file}). If you have "
            f"read it and trust it to run on your workers and endpoints, register the model with --allow-remote-code"
        )
    if "--" in named or not (folder / file).is_file():
        raise InvalidInput(f"{folder.name}: its code {named} does not lie in the folder")


def _read_tensors(folder: Path) -> _Tensors:
    tensors: _Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        start, header = _read_header(path)
        for name, entry in header.items():
            tensors[name] = (path, start, entry)
    return tensors


def _stored_shape(tensors: _Tensors) -> dict[str, Any]:
    """The shape of a decoder (core.plan.shape.ModelShape) as its stored matrices tell it.

    A matrix with a number in its path belongs to a linear module of a layer, and the largest one without is the embedding.
    Layers that differ count as so many equal ones.
    """
    found: dict[str, list[list[int]]] = {}
    embedding = [1, 1]
    for name, (_, _, entry) in tensors.items():
        path, shape = name.split("."), entry["shape"]
        if len(shape) != 2 or path[-1] != "weight":
            continue
        if any(part.isdigit() for part in path):
            found.setdefault(path[-2], []).append(shape)
        else:
            embedding = max(embedding, shape, key=math.prod)
    layers = max(map(len, found.values()), default=1)
    linear = {
        leaf: [math.ceil(sum(inputs for _, inputs in shapes) / layers), math.ceil(sum(outputs for outputs, _ in shapes) / layers)]
        for leaf, shapes in sorted(found.items())
    }
    return {
        "hidden": embedding[1],
        "intermediate": max((inputs for inputs, _ in linear.values()), default=embedding[1]),
        "layers": layers,
        "vocabulary": embedding[0],
        "linear": linear,
    }


def _weights_digest(tensors: _Tensors) -> tuple[str, int]:
    """(hex digest, number of parameters) over all tensors of a folder."""
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
