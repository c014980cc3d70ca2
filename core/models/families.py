"""The families whose decoder layers are fused, in training and serving, and how they differ from Llama's. By model_type in
config.json."""

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


_ACTIVATIONS = ("silu", "swish")

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


def why_not_fused(model: Any) -> str | None:
    """What keeps a causal LM's layers from being computed as this table says; None where nothing does."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"{kind} has no fused layers"
    if model.config.hidden_act not in _ACTIVATIONS:
        return f"fused layers gate with silu, not {model.config.hidden_act}"
    if any(type(layer).__module__ != f"transformers.models.{kind}.modeling_{kind}" for layer in model.get_decoder().layers):
        return "its layers are not transformers' own"
    return None
