"""The canonical form of an adapter folder: plain LoRA on linear modules, in peft's names, every key in its place.

Checked by key and shape against the module tree, before a library loads anything: what is wrong is then named by its key, and
nothing can be passed over.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open

from core.errors import ArtifactError, InvalidInput, Problem
from core.models.adapt import ADAPTER_WEIGHTS, PREFIX

CONFIG_FILE = "adapter_config.json"

_SHOWN = 10
# What plain LoRA and DoRA are made of, and what has no part in the numbers of an adapter that is trained.
_PLAIN = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "lora_dropout"),
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    }
)
_LORA = re.compile(r"(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")


def read_config(folder: Path) -> dict[str, Any]:
    """peft's config of an adapter, with peft's defaults for LoRA where it says nothing; `peft_type` as it says.

    Raises ArtifactError for a file that can't be read.
    """
    try:
        given = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder.name}/{CONFIG_FILE} can't be read: {error}") from None
    if not isinstance(given, dict):
        raise ArtifactError(f"{folder.name}/{CONFIG_FILE} holds no object")
    return {**LoraConfig().to_dict(), "peft_type": None, **given}


def beyond_lora(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a config that ask for more than LoRA or DoRA on linear modules: unknown ones, and what isn't left off.

    `init_lora_weights` is not among them: what a start means for the base is its reader's question.
    """
    defaults = LoraConfig().to_dict()
    return {
        name: value
        for name, value in config.items()
        if name not in _PLAIN and (name not in defaults or value not in (defaults[name], None))
    }


def check_keys(model: Any, folder: Path, whole: tuple[str, ...] = ()) -> None:
    """Raise InvalidInput unless every tensor of an adapter folder has its place in a model, and every pair is a whole one.

    `model` is the plain model, with adapters on it or not; `whole` are the ends of the paths that the adapter may replace
    whole (peft's modules_to_save). ArtifactError for a file that can't be read.
    """
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder.name}/{ADAPTER_WEIGHTS} can't be read: {error}") from None
    modules = dict(_bare_modules(model))
    reasons: dict[str, str] = {}
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        lora = _LORA.fullmatch(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX):
            reasons[key] = f"does not begin with {PREFIX}"
        elif lora is not None:
            pairs.setdefault(lora["path"], {})[lora["part"]] = shape
        elif reason := _whole_reason(key.removeprefix(PREFIX), shape, modules, whole):
            reasons[key] = reason
    for place, parts in pairs.items():
        for part, reason in _pair_reasons(modules.get(place), parts).items():
            reasons[f"{PREFIX}{place}.{part}"] = reason
    if not pairs:
        reasons[ADAPTER_WEIGHTS] = "holds no LoRA weights"
    if reasons:
        problems = [Problem("unmatched-key", f"{key} {reason}") for key, reason in sorted(reasons.items())]
        first = f"{problems[0].message}" + (f", and {len(problems) - 1} more" if len(problems) > 1 else "")
        raise InvalidInput(f"{folder.name} does not fit the model: {first}", problems[:_SHOWN])


def _bare_modules(model: Any) -> list[tuple[str, Any]]:
    """(path in the plain model, the base's own module), whatever peft has put around it."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found.append((path, module.get_base_layer()))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found.append((path, module.original_module))
        else:
            found.append((path, module))
    return found


def _whole_reason(name: str, shape: tuple[int, ...], modules: dict[str, Any], whole: tuple[str, ...]) -> str | None:
    path, _, leaf = name.rpartition(".")
    if path not in modules:
        return "names no module of the model"
    if not any(path == end or path.endswith(f".{end}") for end in whole):
        return "is no LoRA weight, and the config does not say that the adapter brings this module whole (modules_to_save)"
    parameter = dict(modules[path].named_parameters()).get(leaf)
    if parameter is None:
        return f"names no parameter of {path}"
    return None if parameter.shape == shape else f"has the shape {list(shape)}, and the model's {list(parameter.shape)}"


def _pair_reasons(module: Any, parts: dict[str, tuple[int, ...]]) -> dict[str, str]:
    if not isinstance(module, torch.nn.Linear):
        return dict.fromkeys(parts, "names no module of the model" if module is None else "stands on a module that is not linear")
    if missing := [part for part in ("lora_A.weight", "lora_B.weight") if part not in parts]:
        return {missing[0]: "is missing, and the other half of the pair is there"}
    rank = parts["lora_A.weight"][0]
    wanted: dict[str, tuple[int, ...]] = {
        "lora_A.weight": (rank, module.in_features),
        "lora_B.weight": (module.out_features, rank),
        "lora_magnitude_vector": (module.out_features,),
    }
    return {
        part: f"has the shape {list(shape)}, and {list(wanted[part])} fits its module"
        for part, shape in parts.items()
        if shape != wanted[part]
    }
