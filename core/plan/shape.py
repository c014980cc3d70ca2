"""The numbers of a decoder that decide its memory and its time, read out of its config.json, and what of it a job trains."""

from dataclasses import dataclass
from typing import Any

from core.catalog import FAMILIES, REMOTE_CODE, attention_kind
from core.spec import JobSpec, LoraTuning, MoraTuning
from core.tuning import Shapes, adapter_parameters

READERS = {
    "attention": frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"}),
    "output": frozenset({"o_proj", "dense"}),
    "gate": frozenset({"gate_proj", "up_proj", "gate_up_proj", "fc1"}),
    "down": frozenset({"down_proj", "fc2"}),
}
"""Linear modules of a layer by what they read: the normed stream, attention's result, the stream again, the gated product."""

_MLP_MODULES = READERS["gate"] | READERS["down"]
_NORMS = {"glm4": 4, "gemma2": 4, "gemma3_text": 4, "phi": 1}
"""Norms of the residual stream's width in a layer, where they are not two."""
_HEAD_NORMS = ("qwen3", "gemma3_text")


@dataclass(frozen=True)
class ModelShape:
    """Widths are numbers a token has there."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]
    """Leaf name -> (inputs, outputs) of the linear modules in every layer."""
    queries: int
    keys: int
    """Width of the keys, and of the values."""
    head_size: int
    norms: int = 2
    head_norms: bool = False
    """Queries and keys are normed head by head."""
    keeps_scores: bool = False
    """Attention is no fused kernel: its scores stand in memory."""
    tied_embeddings: bool = False
    """Input embedding and output head are one matrix."""
    family: str | None = None
    """`model_type` of the catalogue; None for a model with its own code."""

    @property
    def layer_weights(self) -> int:
        """Numbers in a layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def largest(self) -> int:
        """Numbers in the largest matrix of a layer."""
        return max(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def heads(self) -> int:
        return self.queries // self.head_size

    @property
    def gated(self) -> bool:
        """The MLP multiplies two halves."""
        return "fc1" not in self.linear


def model_shape(architecture: str, config: dict[str, Any]) -> ModelShape:
    """Read the shape of a decoder out of its config.json, or out of what registration found stored of an unknown one."""
    if architecture not in FAMILIES:
        stored = config[REMOTE_CODE]["shape"]
        linear = {name: (inputs, outputs) for name, (inputs, outputs) in stored["linear"].items()}
        hidden = stored["hidden"]
        sizes = (hidden, stored["intermediate"], stored["layers"], stored["vocabulary"])
        return ModelShape(*sizes, linear, queries=hidden, keys=hidden, head_size=min(hidden, 128))
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    sizes_of = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "gate_up_proj": (hidden, 2 * intermediate),
        "down_proj": (intermediate, hidden),
        "qkv_proj": (hidden, queries + 2 * keys),
        "dense": (queries, hidden),
        "fc1": (hidden, intermediate),
        "fc2": (intermediate, hidden),
    }
    family = FAMILIES[architecture]
    return ModelShape(
        hidden=hidden,
        intermediate=intermediate,
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        linear={name: sizes_of[name] for name in family.linear_modules},
        queries=queries,
        keys=keys,
        head_size=head_size,
        norms=_NORMS.get(family.name, 2),
        head_norms=family.name in _HEAD_NORMS,
        keeps_scores=attention_kind(architecture, config) == "eager",
        tied_embeddings=config.get("tie_word_embeddings", family.tied_embeddings),
        family=family.name,
    )


def new_parameters(spec: JobSpec, shape: ModelShape) -> int:
    """Rows of embedding and head for the new tokens, as if the model had none to spare."""
    return (1 if shape.tied_embeddings else 2) * len(spec.data.new_tokens) * shape.hidden


def trainable_parameters(spec: JobSpec, shape: ModelShape, parameters: int) -> int:
    """All of them, new tokens' included; or those of the adapter, and those of embedding and head that train beside it."""
    if not isinstance(spec.tuning, LoraTuning | MoraTuning):
        return parameters
    adapter = adapter_parameters(spec.tuning, targets_of(shape, spec.tuning)) + new_parameters(spec, shape)
    if isinstance(spec.tuning, LoraTuning) and spec.tuning.train_embeddings:
        return adapter + (1 if shape.tied_embeddings else 2) * shape.head_weights
    return adapter


def adapted_modules(shape: ModelShape, tuning: LoraTuning | MoraTuning) -> list[str]:
    """Leaf names of the modules in a layer that carry an adapter."""
    wanted = list(shape.linear) if tuning.target_modules == "all-linear" else tuning.target_modules
    return [name for name in wanted if name in shape.linear]


def targets_of(shape: ModelShape, tuning: LoraTuning | MoraTuning) -> Shapes:
    """The adapted modules, by the paths they have in transformers' decoders."""
    return {
        f"model.layers.{layer}.{'mlp' if name in _MLP_MODULES else 'self_attn'}.{name}": shape.linear[name]
        for layer in range(shape.layers)
        for name in adapted_modules(shape, tuning)
    }
