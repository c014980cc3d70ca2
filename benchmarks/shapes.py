"""Model folders of real shapes with random weights: `python -m benchmarks.shapes SHAPE FOLDER`; prints the device's name.

Speed and memory don't depend on what the weights say. The tokenizer is the tests' tiny one.
"""

import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT

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
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
}
"""Configs by name, of Llama where no other model_type is said; `tiny` is the tests'."""

_COMMON = {
    "model_type": "llama",
    "vocab_size": 32000,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def config_of(shape: str) -> dict[str, Any]:
    """What stands in the config.json of every shape but the tiny one."""
    return _COMMON | SHAPES[shape]


def build(shape: str, folder: Path) -> None:
    """Write a bf16 model folder (the tiny one in fp32)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import build_tiny_model

    build_tiny_model(folder)
    if shape == "tiny":
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(dtype="bfloat16", **config_of(shape)))
    model.save_pretrained(folder)


def made(shape: str, folder: Path) -> str:
    """Build the folder unless it stands, in a process of its own that alone holds torch; return the device's name."""
    if (folder / "config.json").is_file():
        program = [sys.executable, "-c", "from benchmarks.shapes import device_name; print(device_name())"]
    else:
        program = [sys.executable, "-W", "ignore", "-m", "benchmarks.shapes", shape, str(folder)]
    said = subprocess.run(program, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return said.strip().splitlines()[-1]


def made_all(shapes: Iterable[str], models: Path) -> str:
    """Build the folders `models/<shape>` that don't stand yet, side by side; return the device's name."""
    wanted = list(dict.fromkeys(shapes))
    missing = [shape for shape in wanted if not (models / shape / "config.json").is_file()]
    with ThreadPoolExecutor() as threads:
        names = list(threads.map(lambda shape: made(shape, models / shape), missing or wanted[:1]))
    return names[0]


def device_name(wanted: str = "auto") -> str:
    import torch

    if wanted != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU with {torch.get_num_threads()} threads"


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
    print(device_name())
