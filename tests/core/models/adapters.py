"""Every tuning on the tiny model: trained for three steps, written, read back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.models.adapt import attach_adapter, save_lora
from core.models.load import LoadedBase, Precision, Quantization, load_base
from core.spec import LoraTuning, MoraTuning

IDS = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))

TUNINGS: dict[str, LoraTuning | MoraTuning] = {
    "default": LoraTuning(rank=4),
    "rslora": LoraTuning(rank=4, rslora=True),
    "dora": LoraTuning(rank=4, dora=True),
    "pissa": LoraTuning(rank=4, init="pissa"),
    "olora": LoraTuning(rank=4, init="olora"),
    "patterns": LoraTuning(
        rank=4, rank_pattern={"layers.0.*.q_proj": 2, "down_proj": 6}, alpha_pattern={"layers.*.mlp.*": 3.0, "k_proj": 5.0}
    ),
    "pissa-rslora-patterns": LoraTuning(
        rank=4, init="pissa", rslora=True, rank_pattern={"layers.1.self_attn.v_proj": 7}, alpha_pattern={"gate_proj": 4.0}
    ),
    "mora": MoraTuning(rank=4),
    "embeddings": LoraTuning(rank=4, train_embeddings=True),
}


@dataclass(frozen=True)
class Trained:
    model: Any
    folder: Path
    logits: torch.Tensor
    bare: torch.Tensor


def load(folder: Path, quantization: Quantization = "none", precision: Precision = "fp32") -> LoadedBase:
    device = torch.device("cpu")
    return load_base(folder, name="test/tiny", weights="w", quantization=quantization, precision=precision, device=device)


def logits_of(model: Any) -> torch.Tensor:
    """In eval mode, without gradients: [2, 40, 512]."""
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def trained(model_folder: Path, tuning: LoraTuning | MoraTuning, folder: Path, quantization: Quantization = "none") -> Trained:
    """Three steps of AdamW that every parameter takes part in, in fp32; the adapter is written to `folder`."""
    torch.manual_seed(0)
    base = load(model_folder, quantization).model
    bare = logits_of(base)
    model = attach_adapter(base, tuning, "test/tiny")
    assert (logits_of(model) - bare).abs().max() < 1e-5, "training starts from the base"
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True)
    save_lora(model, folder)
    return Trained(model, folder, logits_of(model), bare)
