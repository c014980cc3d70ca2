"""Presets: named settings that a job may begin from. What the job says itself stands; a preset fills in what it leaves out.

The guide-* presets are the recipes of the tutorial that many teams start with, in its own numbers, so that a result can be
compared with theirs. strop's own defaults (core/spec) are what we would choose.
"""

from typing import Any

_ADAPTERS = {"rank": 8, "alpha": 32.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
_THREE_EPOCHS = {"kind": "cosine", "epochs": 3.0}

PRESETS: dict[str, dict[str, Any]] = {
    "guide-full": {
        "tuning": {"kind": "full"},
        "optim": {"kind": "adamw", "learning_rate": 2e-5},
        "schedule": _THREE_EPOCHS,
        "batch": {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    },
    "guide-lora": {
        "tuning": {"kind": "lora", **_ADAPTERS},
        "optim": {"kind": "adamw", "learning_rate": 2e-4},
        "schedule": _THREE_EPOCHS,
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
    },
    "guide-qlora": {
        "tuning": {"kind": "lora", **_ADAPTERS},
        "quantization": {"kind": "nf4", "double_quantization": True},
        "optim": {"kind": "paged_adamw_8bit", "learning_rate": 2e-4},
        "schedule": _THREE_EPOCHS,
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
        "memory": {"checkpointing": True},
    },
}


def fill_in(preset: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The preset's settings under those of `spec`, field by field. A union of another kind replaces the preset's whole.

    Raises KeyError for a name that is no preset.
    """
    return _under(PRESETS[preset], spec)


def _under(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    filled = dict(base)
    for name, value in over.items():
        below = base.get(name)
        if isinstance(below, dict) and isinstance(value, dict) and value.get("kind", below.get("kind")) == below.get("kind"):
            filled[name] = _under(below, value)
        else:
            filled[name] = value
    return filled
