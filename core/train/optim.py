"""Optimizers by name, and the learning rate as a pure function of the step.

Optimizer state is read and written tensor by tensor under the parameter's name, so that a checkpoint needs no pickle; the
8-bit kinds keep their uint8 codes and block scales as they are.
"""

import math
from collections.abc import Iterable
from typing import Any

import bitsandbytes
import torch

from core.spec import OptimSpec, ScheduleSpec


def build_optimizer(
    named_parameters: Iterable[tuple[str, Any]], spec: OptimSpec, device: torch.device, lora_plus_ratio: float | None = None
) -> Any:
    """AdamW (arXiv 1711.05101) of the asked kind over the parameters that train; no decay on norms and biases.

    8-bit states are bitsandbytes' (arXiv 2110.02861). Paged memory exists on a GPU only: on a CPU the paged kinds are the
    same arithmetic without paging. Each group's `lr_scale` is what the step's learning rate is multiplied by: 1, or
    `lora_plus_ratio` for the B matrices of LoRA (LoRA+, arXiv 2402.12354).
    """
    kinds: dict[tuple[float, float], list[Any]] = {}  # (weight decay, scale of the learning rate) -> parameters
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decay = spec.weight_decay if parameter.ndim >= 2 else 0.0
            scale = lora_plus_ratio if lora_plus_ratio is not None and "lora_B" in name.split(".") else 1.0
            kinds.setdefault((decay, scale), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "lr": scale * spec.learning_rate, "lr_scale": scale}
        for (decay, scale), parameters in kinds.items()
    ]
    options: dict[str, Any] = {"lr": spec.learning_rate, "betas": (spec.beta1, spec.beta2), "eps": spec.epsilon}
    paged = device.type == "cuda"
    if spec.kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if spec.kind == "adamw_8bit":
        return bitsandbytes.optim.AdamW8bit(groups, **options)
    if spec.kind == "paged_adamw_8bit":
        return bitsandbytes.optim.AdamW8bit(groups, is_paged=paged, **options)
    return bitsandbytes.optim.AdamW32bit(groups, is_paged=paged, **options)


def learning_rate_factor(spec: ScheduleSpec, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by in step 1 .. total_steps.

    Warm-up rises in equal parts and reaches 1 in its last step, so no step is spent at zero. Linear and cosine decay start
    from 1 in the step after and end above zero in the last.
    """
    if step <= spec.warmup_steps:
        return step / spec.warmup_steps
    if spec.kind == "constant":
        return 1.0
    progress = (step - 1 - spec.warmup_steps) / (total_steps - spec.warmup_steps)
    if spec.kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def optimizer_state(
    named_parameters: Iterable[tuple[str, Any]], optimizer: Any
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, int | float]]]:
    """(tensors named `<parameter>/<key>`, numbers by parameter and key) of an optimizer's state."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, int | float]] = {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def restore_optimizer(
    named_parameters: Iterable[tuple[str, Any]],
    optimizer: Any,
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, dict[str, int | float]],
) -> None:
    """Put back what `optimizer_state` took, into a fresh optimizer over the same parameters."""
    by_name: dict[str, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    places = {
        parameter: (group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }
    for name, parameter in named_parameters:
        if name not in by_name:
            continue
        if hasattr(optimizer, "init_state"):
            # bitsandbytes makes its own buffers, paged ones among them; only their content is ours to bring.
            group_index, index = places[parameter]
            optimizer.init_state(optimizer.param_groups[group_index], parameter, group_index, index)
            for key, tensor in by_name[name].items():
                optimizer.state[parameter][key].copy_(tensor)
        else:
            # torch keeps the step count of a fused AdamW as a tensor beside the parameter.
            optimizer.state[parameter] = {key: _laid_out_as(parameter, tensor) for key, tensor in by_name[name].items()}
        optimizer.state[parameter].update(numbers.get(name, {}))


def _laid_out_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """On the parameter's device and, where it has its shape, in its memory order: the fused kernel walks both as one."""
    if tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
