"""Model folders of real shapes with random weights: `python -m benchmarks.shapes SHAPE FOLDER`; prints the device's name.

Speed and memory don't depend on what the weights say. The tokenizer is the tests' tiny one.
"""

import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
}
"""Llama configs by name; `tiny` is the tests'."""


def build(shape: str, folder: Path) -> None:
    """Write a bf16 model folder (the tiny one in fp32)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import build_tiny_model

    build_tiny_model(folder)
    if shape == "tiny":
        return
    common = {"vocab_size": 32000, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(dtype="bfloat16", **common, **SHAPES[shape]))
    model.save_pretrained(folder)


def device_name(wanted: str = "auto") -> str:
    import torch

    if wanted != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU with {torch.get_num_threads()} threads"


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
    print(device_name())
