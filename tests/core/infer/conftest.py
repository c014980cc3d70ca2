"""Trained results on the tiny model, made with peft and transformers alone, as a fresh process would read them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.models.load import LoadedBase, Quantization, load_base
from tests.lora import add_lora


@pytest.fixture(scope="session")
def lora_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A random but effective LoRA adapter folder (weights and tokenizer, no manifest) per seed."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            made[seed] = add_lora(tiny_model, tmp_path_factory.mktemp("lora") / f"seed{seed}", seed)
        return made[seed]

    return make


@pytest.fixture
def load_tiny(tiny_model: Path) -> Callable[..., LoadedBase]:
    def load(quantization: Quantization = "none", folder: Path = tiny_model) -> LoadedBase:
        return load_base(
            folder, name="tiny", weights="0" * 64, quantization=quantization, precision="fp32", device=torch.device("cpu")
        )

    return load
