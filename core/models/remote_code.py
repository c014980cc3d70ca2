"""A model whose classes lie in its own folder: imported from there, and only there, once its operator has allowed it.

transformers' own way copies such code into a cache beside the user's other files and imports it from that; here the files are
compiled as they lie, nothing is copied, cached or asked on stdin, and compiled files that lie beside them are not looked at.
Who may call it is decided at registration (`core.model_folder`); what the code does then, it does with this process's rights.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, DynamicCache, GenerationMixin

from core.errors import BadSpec
from core.model_folder import code_digest, context_length

_PROBE_TOKENS = 4
_ROUNDING = 0.05
"""Of the largest logit: bf16 and 4-bit kernels differ by less, a forgotten position or a token seen too early by more."""


def load_remote_code(folder: Path, options: dict[str, Any]) -> Any:
    """`from_pretrained` of the classes that the folder's auto_map names; `options` are its keywords.

    Raises BadSpec for code that can't be imported.
    """
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    package = _install(folder)
    try:
        config_class = _class(package, named["AutoConfig"]) if "AutoConfig" in named else AutoConfig
        model_class = _class(package, named["AutoModelForCausalLM"])
    except (AttributeError, ImportError, KeyError, SyntaxError) as error:
        raise BadSpec(f"{folder.name}: its code can't be imported: {type(error).__name__}: {error}") from error
    config = config_class.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return _for_transformers_5(model_class, config, folder).from_pretrained(folder, config=config, **options)


def linear_leaf_names(model: torch.nn.Module) -> list[str]:
    """Leaf names of the linear modules in a model's layers: those with a number in their path, so never the output head."""
    found = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in path.split("."))
    }
    return sorted(found)


@torch.no_grad()
def check_remote_code(model: Any, name: str) -> None:
    """Try on a few tokens what the engine counts on, and stand in where that is possible. `model` is in eval mode.

    A model whose decoder and output head can't be told apart answers for both: its logits then count as the hidden states,
    under a head that does nothing. That costs the logits of all positions, and is right whatever lies between the two.
    Raises BadSpec for a model that is not causal, or that can't go on from a KV cache.
    """
    ids = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        if logits.shape[:2] != ids.shape:
            raise BadSpec(f"{name}: its logits for {_PROBE_TOKENS} tokens of one row have the shape {list(logits.shape)}")
        ids[0, -1] = 0
        changed = model(input_ids=ids, use_cache=False).logits
        if not _are_close(changed[:, :-1], logits[:, :-1]):
            raise BadSpec(f"{name}: its logits change with later tokens, and only causal models can be trained")
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if not _are_close(last[:, -1], changed[:, -1]):
            raise BadSpec(f"{name}: it answers differently from a KV cache, so what it learns could not be served")
    except BadSpec:
        raise
    except Exception as error:  # whatever foreign code raises
        raise BadSpec(f"{name}: its code fails on a few tokens: {type(error).__name__}: {error}") from error
    if getattr(model.config, "vocab_size", None) is None:
        model.config.vocab_size = logits.shape[-1]
    if not _has_plain_head(model, ids, changed):
        whole = _WholeModel(model)
        model.get_decoder = lambda: whole
        model.get_output_embeddings = torch.nn.Identity


def _for_transformers_5(model_class: Any, config: Any, folder: Path) -> Any:
    """The shims: what transformers 5 has of every model, and code written for version 4 may lack.

    Caches count a config's `num_hidden_layers`, which ChatGLM calls `num_layers`, and prompts are bounded by its
    `max_position_embeddings`. `generate` and its preparation, which peft takes over, were part of every model. Loading needs
    `post_init` to have run, once a mere recommendation. Arguments that are None, and `logits_to_keep`, which only spares work,
    are left out where the code doesn't take them.
    """
    if getattr(config, "num_hidden_layers", None) is None:
        if getattr(config, "num_layers", None) is None:
            raise BadSpec(f"{folder.name}: its config has neither num_hidden_layers nor num_layers")
        config.num_hidden_layers = config.num_layers
    if getattr(config, "max_position_embeddings", None) is None:
        config.max_position_embeddings = context_length(config.to_dict())
    accepted = inspect.signature(model_class.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())

    class Adapted(model_class, GenerationMixin):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if not hasattr(self, "all_tied_weights_keys"):
                self.post_init()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            optional = {n for n, value in kwargs.items() if value is None or n == "logits_to_keep"} - accepted.keys()
            return super().forward(*args, **{n: v for n, v in kwargs.items() if takes_all or n not in optional})

    Adapted.__name__, Adapted.__module__ = model_class.__name__, model_class.__module__
    return Adapted


def _has_plain_head(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        return False
    try:
        found = head(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    except Exception:  # whatever foreign code raises: it is not what was hoped for
        return False
    return torch.equal(found, logits)  # nothing between the two, however small


def _are_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To within the rounding of another kernel."""
    return float((a.float() - b.float()).abs().max()) <= _ROUNDING * float(b.float().abs().max())


class _WholeModel:
    """A causal LM in the place of its decoder. Not a module: it must not become a part of the model that it calls."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._model(**arguments).logits)


def _install(folder: Path) -> str:
    """Make the folder's Python files importable as a package, and return its name: one per content of the code."""
    package = f"strop_remote_code_{code_digest(folder)[:16]}"
    if package not in sys.modules:
        sys.meta_path.append(_FolderFinder(package, folder))
    return package


def _class(package: str, reference: str) -> Any:
    module, _, name = reference.rpartition(".")
    return getattr(importlib.import_module(f"{package}.{module}"), name)


class _FolderFinder(MetaPathFinder):
    """Finds `<package>` and `<package>.<file>` in a folder."""

    def __init__(self, package: str, folder: Path) -> None:
        self._package = package
        self._folder = folder

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == self._package:
            return ModuleSpec(fullname, None, is_package=True)
        parent, _, name = fullname.rpartition(".")
        file = self._folder / f"{name}.py"
        if parent != self._package or not file.is_file():
            return None
        return spec_from_file_location(fullname, file, loader=_SourceOnly(fullname, str(file)))


class _SourceOnly(SourceFileLoader):
    """Compiles the source at each import: compiled files are neither believed nor written."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code
