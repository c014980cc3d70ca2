"""Adapters of every tuning side by side on one base: each answers as when it is alone, and the bare base stays bare."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ArtifactError
from core.infer.adapters import AdaptedBase
from core.models.adapt import attach_adapter, save_lora
from core.models.load import LoadedBase, load_base
from tests.core.models.adapters import IDS, TUNINGS

LoadTiny = Callable[..., LoadedBase]


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Tuning -> (folder, logits of the model it was written from)."""
    made = {}
    for seed, (name, tuning) in enumerate(TUNINGS.items()):
        base = load_base(tiny_model, name="t", weights="w", quantization="none", precision="fp32", device=torch.device("cpu"))
        model = attach_adapter(base.model, tuning, "t")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("adapter") / name
        folder.mkdir()
        save_lora(model, folder)
        made[name] = folder, logits_of(model.eval())
    return made


def test_adapters_come_and_go_without_touching_each_other(
    results: dict[str, tuple[Path, torch.Tensor]], load_tiny: LoadTiny, tmp_path: Path
) -> None:
    host = AdaptedBase(load_tiny())
    bare = logits_of(host.model)
    loaded: set[str] = set()

    def check() -> None:
        for name in sorted(loaded):
            host.activate(name)
            assert (logits_of(host.model) - results[name][1]).abs().max() < 1e-4, name
        host.activate(None)
        assert torch.equal(logits_of(host.model), bare)
        assert not any(parameter.requires_grad for parameter in host.model.parameters())

    names = list(TUNINGS)
    # All in, all out by another order, all in again: the first and the last of a base are wrapped and unwrapped.
    for order in (names, names[::-1], names[3:] + names[:3]):
        for name in order:
            if name in loaded:
                host.unload(name)
                loaded.remove(name)
            else:
                host.load(results[name][0], name)
                loaded.add(name)
            check()

    broken = shutil.copytree(results["embeddings"][0], tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    (broken / "adapter_model.safetensors").unlink()
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not in the file"):
        host.load(broken, "broken")
    check()
    for name in names:
        host.unload(name)
    with pytest.raises(ArtifactError, match="not in the file"):
        host.load(broken, "broken")
    loaded.clear()
    check()
    host.load(results["embeddings"][0], "embeddings")
    loaded.add("embeddings")
    check()
