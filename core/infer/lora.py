"""LoRA adapters of a packed step: every token meets the base once, and the adapter of its own request on top.

An adapter folder is read into plain tensors, without peft; its modules of the base get a hook that adds, row range by row
range, what each request's adapter adds there (arXiv 2106.09685; DoRA, 2402.09353). Hooks stand on the base's own modules and
do nothing outside a step, so peft can wrap the same modules beside them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from core.adapter import ADAPTER_KIND
from core.errors import ArtifactError, InvalidInput
from core.manifest import folder_digest, verify_folder
from core.models.adapt import ADAPTER_WEIGHTS, PREFIX
from core.models.canonical import beyond_lora, check_keys, read_config
from core.models.load import dequantized_weight
from core.models.traces import Trace

Kind = Literal["lora", "dora"]
Residence = Literal["here", "coming", "no-room"]


@dataclass(frozen=True)
class Site:
    """What an adapter does to one linear module: y becomes gain · y (without the bias) + up · down · x.

    `down` [r, inputs]; `up` [outputs, r], alpha over rank multiplied in; `gain` fp32 [outputs], None for 1. All fp32 but on their
    way into a GPU's slots.
    """

    down: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor | None

    @property
    def kind(self) -> Kind:
        return "lora" if self.gain is None else "dora"


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """An adapter in memory: module path -> site. `digest` is its folder's.

    Where a GPU has slots for adapters, `staged` is what is copied into one, and `sites` is empty.
    """

    digest: str
    kinds: dict[str, Kind]
    sites: dict[str, Site]
    staged: Any = None


class Slots(Protocol):
    """Room for adapters on a GPU."""

    def staged(
        self, shapes: Mapping[str, int], sites: Iterable[tuple[str, Site]], again: Callable[[], Iterable[tuple[str, Site]]]
    ) -> Any:
        """What is copied into a slot, made of the sites one by one; `shapes` are their ranks, `again` reads them anew. None where
        no slot is large enough."""
        ...

    def prefetch(self, weights: LoraWeights) -> None:
        """Begin to copy it, where there is room."""
        ...

    def forget(self, weights: LoraWeights) -> None:
        """It is served no longer."""
        ...


class Adds(Protocol):
    """What adds the adapters of a step on a GPU."""

    def add(self, path: str, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        """To y [T, outputs], which the module at `path` made of x [T, inputs]."""
        ...


class LoraSites:
    """The linear modules of one base, by path, and the adapters of the step that runs."""

    def __init__(self, model: Any, slots: Slots | None = None) -> None:
        """`model` is the bare base, before anything is wrapped; `slots` is where a GPU has adapters."""
        self._model = model
        self._slots = slots
        self._linear = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        # It is given the last token of each request alone: rows that are not the step's.
        self._head = model.get_output_embeddings()
        self._hooked: set[str] = set()
        self._segments: Sequence[tuple[int, int, LoraWeights]] = ()
        self._adds: Adds | None = None
        self.traces: dict[str, Trace] | None = None

    def read(self, folder: Path, digest: str) -> LoraWeights | None:
        """Read an adapter folder; None where it asks for more than LoRA or DoRA below the head. Touches no module.

        Raises ArtifactError for a file that can't be read, and for tensors that no module of the base takes, by name.
        """
        config = read_config(folder)
        # Another start changes the base's weights too.
        is_started_plainly = config["init_lora_weights"] in (True, False, "gaussian")
        if config["peft_type"] != "LORA" or not is_started_plainly or beyond_lora(config):
            return None
        try:
            check_keys(self._model, folder)
        except InvalidInput as error:
            raise ArtifactError(error.detail) from None
        stored = load_file(folder / ADAPTER_WEIGHTS)
        paths = [name[len(PREFIX) : -len(".lora_A.weight")] for name in stored if name.endswith(".lora_A.weight")]
        if any(self._linear[path] is self._head for path in paths):
            return None
        missing = sorted(self._targets(config) - set(paths))
        if missing:
            raise ArtifactError(f"{folder.name}: its config names {missing[0]}, and no weights are there for it")
        kinds: dict[str, Kind] = dict.fromkeys(paths, "dora" if config["use_dora"] else "lora")
        sites = ((path, self._site(folder, path, config, stored)) for path in paths)
        if self._slots is None:
            return LoraWeights(digest, kinds, dict(sites))
        ranks = {path: len(stored[f"{PREFIX}{path}.lora_A.weight"]) for path in paths}

        def again() -> Iterable[tuple[str, Site]]:
            verify_folder(folder, ADAPTER_KIND)
            if folder_digest(folder) != digest:
                raise ArtifactError(f"{folder.name}: its digest is {folder_digest(folder)}, and {digest} was checked")
            anew = load_file(folder / ADAPTER_WEIGHTS)
            return ((path, self._site(folder, path, config, anew)) for path in paths)

        staged = self._slots.staged(ranks, sites, again)
        return None if staged is None else LoraWeights(digest, kinds, {}, staged)

    def install(self, weights: LoraWeights) -> None:
        """Make its modules ready. Between two steps."""
        for path in weights.kinds.keys() - self._hooked:
            self._linear[path].register_forward_hook(self._hook(path))
            self._hooked.add(path)
        if self._slots is not None:
            self._slots.prefetch(weights)

    def forget(self, weights: LoraWeights) -> None:
        """It is served no longer. Between two steps."""
        if self._slots is not None:
            self._slots.forget(weights)

    @contextmanager
    def running(self, segments: Sequence[tuple[int, int, LoraWeights]], adds: Adds | None = None) -> Iterator[None]:
        """Within the block rows `begin` to `end` of what modules are given belong to these adapters, all others to none; or
        `adds` knows whose they are."""
        self._segments, self._adds = segments, adds
        try:
            yield
        finally:
            self._segments, self._adds = (), None

    @contextmanager
    def tracing(self) -> Iterator[dict[str, Trace]]:
        """Fill a trace per module that an adapter changes, by path and in the order they are reached."""
        self.traces = {}
        try:
            yield self.traces
        finally:
            self.traces = None

    def _hook(self, path: str) -> Any:
        def add(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if self._adds is not None:
                self._adds.add(path, inputs[0].flatten(0, -2), output.flatten(0, -2), module.bias)
            for begin, end, weights in self._segments:
                site = weights.sites.get(path)
                if site is not None:
                    rows = output[:, begin:end]
                    added = _added(site, module.bias, inputs[0][:, begin:end], rows)
                    if self.traces is not None:
                        self.traces.setdefault(path, Trace()).take(added, rows)
                    rows.copy_(rows + added)
            return output

        return add

    def _targets(self, config: dict[str, Any]) -> set[str]:
        """The modules that a config names one by one; a pattern, or a part of the layers, says nothing of what is missing."""
        named = config.get("target_modules")
        if not isinstance(named, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
            return set()
        return {path for path in self._linear if any(f".{path}".endswith(f".{name}") for name in named)}

    def _site(self, folder: Path, path: str, config: dict[str, Any], stored: dict[str, torch.Tensor]) -> Site:
        linear, name = self._linear[path], PREFIX + path
        down, up = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
        magnitude = stored.get(f"{name}.lora_magnitude_vector")
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], path), config["r"])
        if len(down) != rank:
            raise ArtifactError(f"{folder.name}: {path} has rank {len(down)}, and its config says {rank}")
        if (magnitude is None) == config["use_dora"]:
            raise ArtifactError(f"{folder.name}: {path} {'lacks' if config['use_dora'] else 'has'} a magnitude vector")
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], path), config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        if self._slots is not None and magnitude is None:  # a copy follows, and there need be no other
            return Site(down, up if scale == 1 else up.float() * scale, None)
        device = linear.weight.device
        down, up = down.to(device, torch.float32), up.to(device, torch.float32) * scale
        if magnitude is None:
            return Site(down, up, None)
        norm = torch.linalg.vector_norm(dequantized_weight(linear) + up @ down, dim=1)
        gain = magnitude.to(device, torch.float32) / norm
        return Site(down, gain[:, None] * up, gain)


def _added(site: Site, bias: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the site adds to y [1, N, outputs], which the base makes of x [1, N, inputs]: fp32 [1, N, outputs]."""
    added = (x.to(site.down.dtype) @ site.down.T) @ site.up.T
    if site.gain is None:
        return added
    plain = y if bias is None else y - bias
    return added + (site.gain - 1) * plain
