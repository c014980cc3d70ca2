"""ModelFamily: facts about architectures, without weights. Adding a family is adding an entry.

Keys are the `architectures[0]` of a model's config.json. `linear_modules` are the leaf names that `all-linear` means.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFamily:
    name: str
    linear_modules: tuple[str, ...]


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED_GATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")

FAMILIES: dict[str, ModelFamily] = {
    "LlamaForCausalLM": ModelFamily("llama", _SPLIT),
    "MistralForCausalLM": ModelFamily("mistral", _SPLIT),
    "Qwen2ForCausalLM": ModelFamily("qwen2", _SPLIT),
    "Qwen3ForCausalLM": ModelFamily("qwen3", _SPLIT),
    "GlmForCausalLM": ModelFamily("glm", _FUSED_GATE),
    "Glm4ForCausalLM": ModelFamily("glm4", _FUSED_GATE),
}
