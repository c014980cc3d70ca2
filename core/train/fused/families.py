"""The families whose decoder layers are fused, and how they differ from Llama's. By model_type in config.json."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How the layers of a model_type differ from Llama's."""

    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    paired: bool = False
    """Rotary pairs stand side by side."""
    head_norms: bool = False
    """Queries and keys are normed head by head."""
    norms_after: bool = False
    """What attention and gate add to the residual stream is normed before."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
    "glm": Family(gate_up=("gate_up_proj",), paired=True),
    "glm4": Family(gate_up=("gate_up_proj",), paired=True, norms_after=True),
}


def projections_of(layer: Any, family: Family) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Linear modules of a layer that read one input: (queries, keys, values), (attention's output), (gate, up), (down)."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = [attention.q_proj, attention.k_proj, attention.v_proj]
    return heads, [attention.o_proj], [getattr(mlp, name) for name in family.gate_up], [mlp.down_proj]
