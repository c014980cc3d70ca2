"""Packed steps of every family in the catalogue: two requests in pieces, side by side, and each gets the model's own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.catalog import FAMILIES
from core.infer.runner import Context, Runner, kv_bytes_per_token, reach_of
from core.models.load import load_base
from tests.tiny import build_tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "phi": {"tie_word_embeddings": False},
    "phi3": {"sliding_window": 24},
    "smollm3": {"no_rope_layers": [1, 0]},
}
REACH = {"mistral": 24, "gemma3_text": 24, "phi3": 24, "gemma2": 0}


def model_of(family: str, folder: Path) -> Any:
    settings = {"initializer_range": 0.1} | SETTINGS.get(family, {})
    build_tiny_model(folder, family=family, **settings)
    return load_base(folder, name="t", weights="w", quantization="none", precision="fp32", device=torch.device("cpu")).model


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_answers_packed_what_its_model_says(architecture: str, tmp_path: Path) -> None:
    family = FAMILIES[architecture].name
    model = model_of(family, tmp_path / "model")
    assert reach_of(model) == REACH.get(family, 512)
    if family == "gemma2":
        with pytest.raises(ValueError, match="can't express"):
            Runner(model, kv_tokens=512)
        return
    runner = Runner(model, kv_tokens=512)
    generator = torch.Generator().manual_seed(0)
    contexts = [Context(torch.randint(3, 500, (n,), generator=generator).tolist(), None, [b"r"]) for n in (23, 17)]
    with torch.no_grad():
        whole = [model(input_ids=torch.tensor([context.ids]), use_cache=False).logits[0] for context in contexts]
    for pieces in ((9, 1), (1, 8), (12, 1), (1, 7)):
        assert all(runner.reserve(context, count) for context, count in zip(contexts, pieces, strict=True))
        logits = runner.step(list(zip(contexts, pieces, strict=True)))
        for row, context, own in zip(logits, contexts, whole, strict=True):
            assert (row - own[context.computed - 1]).abs().max() <= 1e-4
    assert [context.left for context in contexts] == [0, 0]
    kept = runner._store._layers[0][0]
    assert kv_bytes_per_token(model) == 2 * len(runner._store._layers) * kept[0].numel() * kept.element_size()
