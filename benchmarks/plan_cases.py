"""What benchmarks.plan fits the plan's coefficients to, and what it judges them by."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.children import Rows, in_training_order, rows_of, short_lengths
from core.spec import JobSpec

STEPS = 6
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    shape: str
    method: Literal["lora", "qlora", "full"]
    length: int
    """data.max_length. Rows are between half of it and all of it; of 512, `short`: log-normal, about 130 tokens."""
    rows: int
    times: int = 1
    rank: int = 16
    modules: Literal["all", "qv"] = "all"
    short: bool = False
    recompute: int = 0
    """memory.checkpointing_every; 0 is no checkpointing."""
    fused: bool = False
    offload: bool = False
    packing: Literal["auto", "off"] = "auto"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        method = self.method if self.method == "full" else f"{self.method}{self.rank}-{self.modules}"
        parts = [method, "short" if self.short else str(self.length), f"{self.rows}x{self.times}"]
        parts += [f"ckpt{self.recompute}"] if self.recompute else []
        parts += ["fused"] if self.fused else []
        parts += ["offload"] if self.offload else []
        parts += ["padded"] if self.packing == "off" else []
        parts += [self.optimizer] if self.optimizer != "adamw" else []
        return f"{self.shape}/{'-'.join(parts)}"

    def spec(self) -> JobSpec:
        tuning: dict[str, Any] = {"kind": "full"}
        if self.method != "full":
            modules: Any = "all-linear" if self.modules == "all" else ["q_proj", "v_proj"]
            tuning = {"kind": "lora", "rank": self.rank, "alpha": 32.0, "target_modules": modules}
        memory: dict[str, Any] = {"fused_layers": self.fused}
        if self.recompute:
            memory |= {"checkpointing": True, "checkpointing_every": self.recompute, "checkpointing_offload": self.offload}
        batch = {"micro_batch_size": self.rows, "gradient_accumulation_steps": self.times, "packing": self.packing}
        return JobSpec.model_validate(
            {
                "base_model": "bench/model",
                "data": {"datasets": [{"dataset_id": "ds_00000000"}], "max_length": self.length},
                "tuning": tuning,
                "quantization": {"kind": "nf4" if self.method == "qlora" else "none"},
                "batch": batch,
                "memory": memory,
                "optim": {"kind": self.optimizer, "learning_rate": 1e-5},
                "schedule": {"max_steps": STEPS},
                "checkpoints": {"every_steps": None},
            }
        )

    def made_rows(self) -> Rows:
        """As many as the steps take, those of the warm-up again and again; the same at every call."""
        rng = np.random.default_rng([self.length, self.rows, self.times])
        count = WARM_UP * self.rows * self.times
        lengths = short_lengths(rng, count, self.length) if self.short else rng.integers(self.length // 2, self.length + 1, count)
        return in_training_order(rows_of(rng, lengths) * (STEPS // WARM_UP), self.spec())


_SMALL, _LARGE, _OTHER = "llama-1.1b", "llama2-7b", "qwen3-8b"

FITTING = [
    Case(_SMALL, "lora", 512, 16, 4, short=True),
    Case(_SMALL, "lora", 512, 16, 4, short=True, modules="qv"),
    Case(_SMALL, "lora", 512, 16, 4, short=True, packing="off"),
    Case(_SMALL, "lora", 1024, 8, 2),
    Case(_SMALL, "lora", 2048, 4, 2, recompute=1),
    Case(_SMALL, "qlora", 1024, 8, 2),
    Case(_SMALL, "lora", 512, 64, 2, short=True, fused=True),
    Case(_SMALL, "lora", 512, 8, short=True, rank=8, fused=True),
    Case(_SMALL, "full", 512, 16, 4, short=True),
    Case(_SMALL, "full", 512, 32, 2, short=True, fused=True),
    Case(_SMALL, "full", 1024, 8, 2, optimizer="adamw_8bit"),
    Case(_SMALL, "full", 2048, 4, 2, recompute=1),
    Case(_LARGE, "lora", 512, 8, 4, short=True),
    Case(_LARGE, "lora", 2048, 2, 2),
    Case(_LARGE, "qlora", 512, 16, 2, short=True),
    Case(_LARGE, "qlora", 512, 16, 2, short=True, fused=True),
    Case(_LARGE, "qlora", 1024, 8, 2, recompute=1, fused=True, offload=True),
    Case(_LARGE, "qlora", 512, 8, 4, short=True, packing="off"),
    Case(_LARGE, "qlora", 1024, 8, 2, recompute=1),
    Case(_LARGE, "qlora", 2048, 4, 2, rank=8, modules="qv", recompute=2),
]
JUDGED = [
    Case(_SMALL, "lora", 512, 16, 2, fused=True),
    Case(_SMALL, "lora", 1024, 16, rank=8, modules="qv"),
    Case(_SMALL, "lora", 1024, 8, 2, packing="off"),
    Case(_SMALL, "lora", 512, 32, 2, short=True, rank=64),
    Case(_SMALL, "lora", 2048, 4, 2),
    Case(_SMALL, "lora", 4096, 2, 2),
    Case(_SMALL, "lora", 8192, 1, 2),
    Case(_SMALL, "qlora", 256, 32, 2, modules="qv"),
    Case(_SMALL, "qlora", 2048, 8),
    Case(_SMALL, "full", 256, 32, 2),
    Case(_SMALL, "full", 1024, 8, fused=True),
    Case(_SMALL, "full", 512, 16, 4, short=True, optimizer="paged_adamw_8bit"),
    Case(_SMALL, "full", 4096, 4, recompute=1),
    Case(_LARGE, "lora", 1024, 8, fused=True),
    Case(_LARGE, "lora", 2048, 2, 2, modules="qv"),
    Case(_LARGE, "lora", 512, 16, 2, short=True, rank=64, recompute=1),
    Case(_LARGE, "qlora", 256, 16, 2),
    Case(_LARGE, "qlora", 512, 16, 4, short=True, recompute=1, fused=True, offload=True),
    Case(_LARGE, "qlora", 1024, 4, 2, rank=64),
    Case(_LARGE, "qlora", 2048, 2, 2, fused=True),
    Case(_LARGE, "qlora", 4096, 2, recompute=1, fused=True),
    Case(_OTHER, "lora", 512, 8, 4, short=True),
    Case(_OTHER, "lora", 512, 8, 2, rank=8, modules="qv"),
    Case(_OTHER, "lora", 1024, 8, recompute=1),
    Case(_OTHER, "qlora", 512, 8, 4, short=True, fused=True),
    Case(_OTHER, "qlora", 512, 16, 2, recompute=1),
    Case(_OTHER, "qlora", 2048, 2, 2),
    Case(_OTHER, "qlora", 8192, 1, 2, recompute=1),
]
SETS = {
    "fit": FITTING,
    "judged": JUDGED,
    "tiny": [Case("tiny", "lora", 64, 4, 2), Case("tiny", "full", 64, 4, recompute=1, fused=True)],
}
