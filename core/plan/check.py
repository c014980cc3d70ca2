"""What a model can't do of what a spec asks. Ranges are the spec's own business; the control plane refuses a job by this."""

from collections.abc import Sequence
from typing import Any

from core.catalog import FAMILIES, TWO_TOWERS, TwoTowers, can_pack, task_of
from core.errors import Problem
from core.plan.shape import model_shape, targets_of
from core.spec import JobSpec, LoraTuning, MoraTuning
from core.tuning import tuning_problems


def check_spec(spec: JobSpec, *, architecture: str, context_length: int, config: dict[str, Any]) -> list[Problem]:
    """Every reason why this model can't do what the spec asks; empty when it can. Ranges are the spec's own business."""
    task = task_of(architecture)
    if task != spec.task:
        message = f"{spec.base_model} is a {architecture}, a model for task {task}, not {spec.task}"
        return [Problem("wrong-task", message, pointer="/task")]
    towers = TWO_TOWERS.get(architecture)
    if towers is not None:
        problems = _tower_problems(spec, towers)
    else:
        problems = _decoder_problems(spec, architecture, context_length, config)
    if spec.eval.every_steps is not None and not spec.data.eval_rows:
        message = "there is nothing to evaluate on: set data.eval_rows"
        problems.append(Problem("no-eval-rows", message, pointer="/eval/every_steps"))
    seen = set()
    for number, ref in enumerate(spec.data.datasets):
        if ref.dataset_id in seen:
            message = "the dataset is named twice; use its weight instead"
            problems.append(Problem("duplicate-dataset", message, pointer=f"/data/datasets/{number}/dataset_id"))
        seen.add(ref.dataset_id)
    return problems


def _decoder_problems(spec: JobSpec, architecture: str, context_length: int, config: dict[str, Any]) -> list[Problem]:
    problems = []
    if spec.data.max_length > context_length:
        message = f"{spec.base_model} reads at most {context_length} tokens, not {spec.data.max_length}"
        problems.append(Problem("max-length-exceeds-context", message, pointer="/data/max_length"))
    if isinstance(spec.tuning, LoraTuning | MoraTuning):
        shape = model_shape(architecture, config)
        unknown = _unknown_targets(spec.base_model, spec.tuning, list(shape.linear))
        problems += unknown
        if not unknown and architecture in FAMILIES:  # the paths of others are known to the child alone
            problems += tuning_problems(spec.tuning, targets_of(shape, spec.tuning))
    elif architecture not in FAMILIES:
        message = f"{spec.base_model} brings its own code, which a fully tuned model would need beside it: use LoRA"
        problems.append(Problem("remote-code-full-tuning", message, pointer="/tuning/kind"))
    if spec.data.new_tokens and architecture not in FAMILIES:
        message = f"{spec.base_model} brings its own code, which a model with new tokens would need beside it"
        problems.append(Problem("remote-code-new-tokens", message, pointer="/data/new_tokens"))
    obstacle = can_pack(architecture, config, spec.data.max_length)
    if spec.batch.packing == "on" and obstacle is not None:
        problems.append(Problem("packing-impossible", f"{spec.base_model}: {obstacle}", pointer="/batch/packing"))
    if spec.memory.fused_layers and (obstacle is not None or not FAMILIES[architecture].fused):
        message = f"{spec.base_model}: {obstacle or f'{FAMILIES[architecture].name} has no fused layers'}"
        problems.append(Problem("fused-layers-impossible", message, pointer="/memory/fused_layers"))
    return problems


def _tower_problems(spec: JobSpec, towers: TwoTowers) -> list[Problem]:
    # Paths and shapes are the child's to know; names can be told from the catalogue.
    if not isinstance(spec.tuning, LoraTuning | MoraTuning):
        return []
    locked = spec.pictures is not None and spec.pictures.image_tower == "locked"
    projections = [towers.text[-1]] if locked else towers.projections
    return _unknown_targets(spec.base_model, spec.tuning, [*towers.linear_modules, *projections])


def _unknown_targets(model: str, tuning: LoraTuning | MoraTuning, known: Sequence[str]) -> list[Problem]:
    if tuning.target_modules == "all-linear":
        return []
    if not tuning.target_modules:
        return [Problem("no-target-modules", f"name at least one of: {', '.join(known)}", pointer="/tuning/target_modules")]
    return [
        Problem(
            "unknown-target-module",
            f"{model} has no linear module {name}; it has: {', '.join(known)}",
            pointer=f"/tuning/target_modules/{number}",
        )
        for number, name in enumerate(tuning.target_modules)
        if name not in known
    ]
