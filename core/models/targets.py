"""Which linear modules of a model an adapter stands on, and how peft is told of each one's rank and alpha.

Users name modules by their last part (`q_proj`) and single them out by patterns (`core.tuning`). peft is told in terms of the
modules that were found, so that no user's text is ever read as a regular expression.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch

from core.catalog import FAMILIES, TWO_TOWERS
from core.errors import BadSpec
from core.models.remote_code import linear_leaf_names

V = TypeVar("V", int, float)


def find_targets(
    model: Any, wanted: Literal["all-linear"] | list[str], within: Sequence[str] = ("",)
) -> dict[str, torch.nn.Linear]:
    """Path -> module. Only modules under one of the paths `within` may be found; the empty path is the whole model.

    Raises BadSpec for names that are no linear module there.
    """
    linear: dict[str, torch.nn.Linear] = {}
    other: set[str] = set()
    for path, module in model.named_modules():
        if not any(part in ("", path) or path.startswith(f"{part}.") for part in within):
            continue
        if isinstance(module, torch.nn.Linear):
            linear[path] = module
        else:
            other.add(leaf(path))
    there = {leaf(path) for path in linear}
    names = _all_linear(model) if wanted == "all-linear" else list(dict.fromkeys(wanted))
    if not names:
        raise BadSpec("tuning.target_modules: the list is empty")
    wrong = [name for name in names if name not in there]
    if wrong:
        reasons = ", ".join(f"{n} (not linear)" if n in other else f"{n} (not there)" for n in wrong)
        raise BadSpec(f"tuning.target_modules: {reasons}; linear modules of this model: {', '.join(sorted(there))}")
    return {path: module for path, module in linear.items() if leaf(path) in names}


def peft_pattern(values: Mapping[str, V], default: V) -> dict[str, V]:
    """What peft's `rank_pattern` or `alpha_pattern` must hold for each path to get its value.

    By the last part of the path where all modules of that name agree, else path by path. peft reads the keys as regular
    expressions for the end of a path.
    """
    by_name: dict[str, set[V]] = {}
    for path, value in values.items():
        by_name.setdefault(leaf(path), set()).add(value)
    pattern: dict[str, V] = {}
    for path, value in values.items():
        if by_name[leaf(path)] == {value}:
            pattern[re.escape(leaf(path))] = value
        else:
            pattern[re.escape(path)] = value
    return {key: value for key, value in pattern.items() if value != default}


def leaf(path: str) -> str:
    """The last part of a module's path."""
    return path.rpartition(".")[2]


def architecture_of(model: Any) -> str:
    """What the model's config calls itself; "unknown" where it says nothing."""
    return str((model.config.architectures or ["unknown"])[0])


def _all_linear(model: Any) -> list[str]:
    architecture = architecture_of(model)
    if architecture in TWO_TOWERS:
        return list(TWO_TOWERS[architecture].linear_modules)
    return list(FAMILIES[architecture].linear_modules) if architecture in FAMILIES else linear_leaf_names(model)
