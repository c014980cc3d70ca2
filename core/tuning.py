"""What an adapter on a decoder's linear modules holds: which of them, at which rank, how many numbers.

Pure arithmetic over paths and shapes: the control plane has them from a model's config, the child from the model itself, and
both must come to the same result.
"""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from core.errors import Problem
from core.spec import LoraTuning, MoraTuning

Shapes = Mapping[str, tuple[int, int]]
"""Path of a linear module -> (inputs, outputs)."""

V = TypeVar("V", int, float)


def match_patterns(patterns: Mapping[str, V], paths: Collection[str]) -> tuple[dict[str, V], dict[str, str]]:
    """(path -> the value of the pattern it matches, pattern -> what is wrong with it).

    A pattern is the end of a path, in whole parts; `*` is any text within one part. Wrong is one that matches nothing, and one
    that contradicts another: JSON does not keep their order, so neither can come first.
    """
    values: dict[str, V] = {}
    problems: dict[str, str] = {}
    for pattern, value in patterns.items():
        matched = [path for path in paths if _matches(pattern, path)]
        if not matched:
            problems[pattern] = f"{pattern} matches none of the modules that are adapted"
        for path in matched:
            if values.setdefault(path, value) != value:
                problems[pattern] = f"{pattern} says {value} and another pattern {values[path]} of {path}"
                break
    return values, problems


def mora_size(inputs: int, outputs: int, rank: int) -> int:
    """Side of MoRA's square with as many numbers as LoRA of `rank` (arXiv 2405.12130, section 3), at most the module's own."""
    return min(math.isqrt((inputs + outputs) * rank), inputs, outputs)


def adapter_parameters(tuning: LoraTuning | MoraTuning, targets: Shapes) -> int:
    """How many numbers are trained on these modules, embeddings apart."""
    if isinstance(tuning, MoraTuning):
        return sum(mora_size(inputs, outputs, tuning.rank) ** 2 for inputs, outputs in targets.values())
    ranks, _ = match_patterns(tuning.rank_pattern, targets)
    low_rank = sum(ranks.get(path, tuning.rank) * (inputs + outputs) for path, (inputs, outputs) in targets.items())
    magnitudes = sum(outputs for _, outputs in targets.values()) if tuning.dora else 0
    return low_rank + magnitudes


def tuning_problems(tuning: LoraTuning | MoraTuning, targets: Shapes) -> list[Problem]:
    """Why these modules can't be adapted as the tuning says; empty where they can."""
    if isinstance(tuning, MoraTuning):
        return []
    ranks, wrong_ranks = match_patterns(tuning.rank_pattern, targets)
    _, wrong_alphas = match_patterns(tuning.alpha_pattern, targets)
    problems = [
        Problem("module-pattern", message, pointer=f"/tuning/{field}/{pattern}")
        for field, wrong in (("rank_pattern", wrong_ranks), ("alpha_pattern", wrong_alphas))
        for pattern, message in wrong.items()
    ]
    if tuning.init != "default":
        for path, (inputs, outputs) in targets.items():
            rank = ranks.get(path, tuning.rank)
            if rank > min(inputs, outputs):
                message = f"{path} has {min(inputs, outputs)} directions for {tuning.init} to begin along, not {rank}"
                problems.append(Problem("rank-exceeds-module", message, pointer="/tuning/rank"))
                break
    return problems


def _matches(pattern: str, path: str) -> bool:
    wanted, parts = pattern.split("."), path.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts[-len(wanted) :], wanted))
