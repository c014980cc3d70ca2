"""LoRA beside the base: what peft computes, for every tuning that the fast path takes, and a word for every one it can't."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ArtifactError
from core.infer.adapters import AdaptedBase
from core.models.load import LoadedBase
from tests.core.models.adapters import IDS, TUNINGS, trained

LoadTiny = Callable[..., LoadedBase]
PACKED = sorted(set(TUNINGS) - {"embeddings"})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("tuning", PACKED)
def test_each_tuning_computes_what_peft_does(
    tuning: str, quantization: str, tiny_model: Path, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    made = trained(tiny_model, TUNINGS[tuning], tmp_path / tuning, quantization)  # type: ignore[arg-type]
    host = AdaptedBase(load_tiny(quantization))
    assert host.runner is not None
    weights = host.runner.sites.read(made.folder, "digest")
    assert weights is not None
    host.runner.sites.install(weights)
    rows = [row[: len(row) - number] for number, row in enumerate(IDS.tolist())]  # of different lengths, in one step
    for answered, wanted, limit in ((weights, made.logits, 1e-4), (None, made.bare, 1e-5)):
        for row, logits, want in zip(rows, host.runner.score(rows, answered), wanted, strict=True):
            assert len(logits) == len(row)
            assert (logits - want[: len(row)]).abs().max() <= limit
    assert (made.logits - made.bare).abs().max() > 1e-2, "it does something"


def test_it_stands_beside_adapters_of_peft(lora_folder: Callable[[int], Path], load_tiny: LoadTiny) -> None:
    host = AdaptedBase(load_tiny())
    assert host.runner is not None
    bare = host.runner.score([IDS[0].tolist()], None)[0]
    weights = host.runner.sites.read(lora_folder(1), "one")
    assert weights is not None
    host.runner.sites.install(weights)
    alone = host.runner.score([IDS[0].tolist()], weights)[0]
    host.load(lora_folder(2), "two")
    host.activate("two")
    assert torch.equal(host.runner.score([IDS[0].tolist()], weights)[0], alone)
    assert torch.equal(host.runner.score([IDS[0].tolist()], None)[0], bare)
    host.activate("two")
    with torch.no_grad():
        by_peft = host.model(IDS[:1]).logits[0]
    assert (by_peft - bare).abs().max() > 1e-2
    assert (by_peft - alone).abs().max() > 1e-2


@pytest.mark.parametrize(
    "asked",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [3]},
        {"layer_replication": [[0, 1]]},
        {"something_new": 4},
        {"peft_type": "VERA"},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_more_than_lora_is_left_to_peft(
    asked: dict[str, object], lora_folder: Callable[[int], Path], load_tiny: LoadTiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora_folder(0), tmp_path / "more")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | asked))
    host = AdaptedBase(load_tiny())
    assert host.runner is not None
    assert host.runner.sites.read(folder, "digest") is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"), "layers.0.self_attn.q_proj"),
        (
            lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}),
            "layers.9.self_attn",
        ),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(8)}), "model.norm.weight"),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 8)}),
            "layers.0.self_attn.q_proj",
        ),
    ],
    ids=["half a pair", "no such module", "no module's", "another shape"],
)
def test_tensors_that_fit_nowhere_are_named(
    spoil: Callable[[dict[str, torch.Tensor]], object],
    said: str,
    lora_folder: Callable[[int], Path],
    load_tiny: LoadTiny,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(lora_folder(0), tmp_path / "spoilt")
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(tensors)
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors")
    host = AdaptedBase(load_tiny())
    assert host.runner is not None
    with pytest.raises(ArtifactError, match=said.replace(".", r"\.")):
        host.runner.sites.read(folder, "digest")


def test_a_file_that_is_cut_off_is_refused(lora_folder: Callable[[int], Path], load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = shutil.copytree(lora_folder(0), tmp_path / "cut")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    host = AdaptedBase(load_tiny())
    assert host.runner is not None
    with pytest.raises(ArtifactError, match="can't be read"):
        host.runner.sites.read(folder, "digest")
