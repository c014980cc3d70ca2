"""ModelFamily: facts about architectures, without weights. Adding a family is adding an entry.

Keys are the `architectures[0]` of a model's config.json. What a config.json leaves out has the value that transformers' config
class gives it, so where that decides about attention it stands in the entry.
"""

from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["causal_lm", "contrastive"]
"""What a model is trained to do: go on with a text, or put a picture and its caption close to each other."""

Tier = Literal["plain", "packed", "fused"]
"""What a run's steps are computed by (docs/methods.md)."""


@dataclass(frozen=True)
class ModelFamily:
    name: str
    """`model_type` in config.json."""
    linear_modules: tuple[str, ...]
    """Leaf names that `all-linear` means: every linear module but the output head."""
    sliding_window: int | None = None
    """Tokens that attention sees, the own one included, where config.json says nothing; None is all of them."""
    softcap: float | None = None
    """Bound of the attention scores (arXiv 2408.00118, section 2) where config.json says nothing."""
    fused: bool = False
    """core/train/fused has decoder layers for it."""
    tied_embeddings: bool = False
    """Whether input embedding and output head are one matrix where config.json says nothing."""


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED_GATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")

FAMILIES: dict[str, ModelFamily] = {
    "LlamaForCausalLM": ModelFamily("llama", _SPLIT, fused=True),  # SmolLM and SmolLM2 too
    "MistralForCausalLM": ModelFamily("mistral", _SPLIT, sliding_window=4096),
    "Qwen2ForCausalLM": ModelFamily("qwen2", _SPLIT, fused=True),  # Qwen2.5 too
    "Qwen3ForCausalLM": ModelFamily("qwen3", _SPLIT, fused=True),
    "GlmForCausalLM": ModelFamily("glm", _FUSED_GATE, fused=True),
    "Glm4ForCausalLM": ModelFamily("glm4", _FUSED_GATE, fused=True),
    "GemmaForCausalLM": ModelFamily("gemma", _SPLIT, tied_embeddings=True),
    "Gemma2ForCausalLM": ModelFamily("gemma2", _SPLIT, sliding_window=4096, softcap=50.0, tied_embeddings=True),
    "Gemma3ForCausalLM": ModelFamily("gemma3_text", _SPLIT, sliding_window=4096, tied_embeddings=True),
    "PhiForCausalLM": ModelFamily("phi", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "Phi3ForCausalLM": ModelFamily("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "SmolLM3ForCausalLM": ModelFamily("smollm3", _SPLIT, tied_embeddings=True),
}


@dataclass(frozen=True)
class TwoTowers:
    """A model of one tower for pictures and one for texts, which meet in one space."""

    name: str
    """`model_type` in config.json."""
    linear_modules: tuple[str, ...]
    """Leaf names that `all-linear` means: every linear module but the projections."""
    image: tuple[str, ...]
    """The modules that a picture goes through, projection last."""
    text: tuple[str, ...]
    """Those of a text, likewise."""
    text_length: int
    """Tokens of a text, at most, where config.json says nothing."""

    @property
    def projections(self) -> tuple[str, str]:
        return self.image[-1], self.text[-1]


TWO_TOWERS: dict[str, TwoTowers] = {
    "CLIPModel": TwoTowers(
        "clip",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        image=("vision_model", "visual_projection"),
        text=("text_model", "text_projection"),
        text_length=77,
    ),
}

REMOTE_CODE = "strop_remote_code"
"""Key that registration adds to the config of a model which brings its own code: what is known of it without running it."""

_SWITCHED_WINDOWS = ("qwen2", "qwen3", "smollm3")
"""Their window counts only where `use_sliding_window` says so."""


def task_of(architecture: str) -> Task:
    """What a model of this architecture can be trained to do; its own code, where it brings any, is a causal LM's."""
    return "contrastive" if architecture in TWO_TOWERS else "causal_lm"


def attention_kind(architecture: str, config: dict[str, Any]) -> Literal["sdpa", "eager"]:
    """transformers' attention that computes what the model was trained with.

    Scores that are capped before the softmax have no place in torch's fused attention, and transformers' `sdpa` leaves the cap
    out without a word.
    """
    return "sdpa" if _softcap(architecture, config) is None else "eager"


def can_pack(architecture: str, config: dict[str, Any], max_length: int) -> str | None:
    """None when plain causal attention within each row is what this model computes on rows of up to `max_length` tokens.

    Else the reason in a few words. `config` is the model's config.json.
    """
    if architecture not in FAMILIES:
        return "its attention is its own code"
    if _softcap(architecture, config) is not None:
        return "its attention caps its scores"
    if config.get("use_bidirectional_attention"):
        return "its attention looks ahead"
    if config.get("attention_dropout"):
        return f"its config sets attention_dropout {config['attention_dropout']:g}"
    window = _sliding_window(architecture, config)
    if window is not None and window < max_length:
        return f"its attention sees {window} tokens and rows may have {max_length}"
    reach = _fixed_reach(config)
    if reach is not None and reach < max_length:
        return f"its positions are scaled by the longest row of a batch beyond {reach} tokens, and rows may have {max_length}"
    return None


def packed_reach(architecture: str, config: dict[str, Any], max_length: int) -> int:
    """The longest rows, up to `max_length` tokens, that `can_pack` allows; 0 where it allows none."""
    bounds = [max_length]
    if architecture in FAMILIES:
        bounds += [bound for bound in (_sliding_window(architecture, config), _fixed_reach(config)) if bound is not None]
    reach = min(bounds)
    return reach if can_pack(architecture, config, reach) is None else 0


def _softcap(architecture: str, config: dict[str, Any]) -> float | None:
    family = FAMILIES.get(architecture)
    cap: float | None = config.get("attn_logit_softcapping", family.softcap if family else None)
    return cap


def _sliding_window(architecture: str, config: dict[str, Any]) -> int | None:
    family = FAMILIES[architecture]
    if family.name in _SWITCHED_WINDOWS and not config.get("use_sliding_window"):
        return None
    if "sliding_attention" not in (config.get("layer_types") or ["sliding_attention"]):
        return None
    window: int | None = config.get("sliding_window", family.sliding_window)
    return window


def _fixed_reach(config: dict[str, Any]) -> int | None:
    """Tokens up to which rotary positions don't depend on how long the rows of a batch are; None when they never do."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if config.get("model_type") == "phi3" and kind in ("su", "yarn"):  # older names of the same
        kind = "longrope"
    fallback = {"longrope": config.get("original_max_position_embeddings"), "dynamic": config.get("max_position_embeddings")}
    if kind not in fallback:
        return None
    reach: int = scaling.get("original_max_position_embeddings") or fallback[kind] or 2048
    return reach
