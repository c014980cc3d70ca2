"""JobSpec: what a user asks for. Validated once at submit, stored as JSON, handed to the child, never changed.

Unions are told apart by `kind`, so each choice carries only its own fields; unknown fields are refused at any depth.
Units are in the names. Ranges stand in the JSON schema, so the OpenAPI page shows them. A function of the engine takes
the part it needs (`OptimSpec`), never the whole.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator


class Frozen(BaseModel):
    """Strict (no "3" for 3), closed (no unknown field), no NaN or infinity, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# Free text holds no NUL: PostgreSQL has no place for one. (Lone surrogates pydantic refuses itself.)
AdapterName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$")]
DatasetId = Annotated[str, StringConstraints(pattern=r"^ds_[a-z0-9]{8,40}$")]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
MetadataKey = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=64)]
MetadataValue = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=512)]


class SftObjective(Frozen):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens, mean over all trained tokens of a step."""

    kind: Literal["sft"] = "sft"
    train_on: Literal["last_turn", "all_turns"] = Field(
        default="all_turns", description="Which assistant turns carry loss; the rest is context."
    )


class FullTuning(Frozen):
    """Every weight is trained."""

    kind: Literal["full"] = "full"


class LoraTuning(Frozen):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on frozen weights; with `quantization` nf4 this is QLoRA (2305.14314)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=512)
    alpha: float = Field(default=16.0, gt=0, le=4096, description="Scale: the update is (alpha / rank) · B·A.")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[ModuleName] = Field(
        default="all-linear", description="Names of linear modules, or all of them but the output head."
    )


class NoQuantization(Frozen):
    kind: Literal["none"] = "none"


class Nf4Quantization(Frozen):
    """4-bit NormalFloat blocks of frozen weights (QLoRA, arXiv 2305.14314)."""

    kind: Literal["nf4"] = "nf4"
    double_quantization: bool = Field(default=True, description="Quantise the block scales too (0.37 bit per weight less).")


class DatasetRef(Frozen):
    dataset_id: DatasetId
    weight: float = Field(default=1.0, gt=0, le=100, description="Passes over this dataset per epoch.")


class DataSpec(Frozen):
    datasets: list[DatasetRef] = Field(min_length=1, max_length=32)
    template: Literal["model", "chatml", "alpaca"] = Field(
        default="model", description="Chat template: the model's own (ChatML where it has none), or one by name."
    )
    max_length: int = Field(default=512, ge=8, le=131072, description="Tokens per row; what is over is cut from the end.")
    eval_rows: int = Field(default=0, ge=0, le=100_000, description="Rows held out of training, chosen by the seed.")


class OptimSpec(Frozen):
    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0, le=1e-2)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="Gradients are clipped to this global norm.")


class ScheduleSpec(Frozen):
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    epochs: float = Field(default=1.0, gt=0, le=1000, description="Passes over the data; `max_steps` ends it earlier.")
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000)

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) exceeds max_steps ({self.max_steps})")
        return self


class BatchSpec(Frozen):
    """Rows per optimizer step = micro_batch_size × gradient_accumulation_steps."""

    micro_batch_size: int = Field(default=4, ge=1, le=4096, description="Rows in memory at once.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=4096, description="Micro-batches per optimizer step.")


class MemorySpec(Frozen):
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="Compute precision; auto is bf16 where the device has it, else fp32."
    )
    checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass.")


class EvalSpec(Frozen):
    every_steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Held-out loss every n steps, beside the ones before and after training.",
    )


class CheckpointSpec(Frozen):
    every_steps: int | None = Field(default=100, ge=1, le=1_000_000, description="None: only when asked to stop.")
    keep: int = Field(default=2, ge=1, le=100, description="The newest n are kept.")


class JobSpec(Frozen):
    """One fine-tuning job."""

    spec_version: Literal[1] = 1
    task: Literal["causal_lm"] = "causal_lm"
    base_model: ModelName
    adapter_name: AdapterName | None = Field(
        default=None,
        description="Name of the result; an existing name gets a new version. Default: made from the job's id.",
    )
    objective: SftObjective = SftObjective()
    tuning: Annotated[LoraTuning | FullTuning, Field(discriminator="kind")] = LoraTuning()
    quantization: Annotated[NoQuantization | Nf4Quantization, Field(discriminator="kind")] = NoQuantization()
    data: DataSpec
    optim: OptimSpec = OptimSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    batch: BatchSpec = BatchSpec()
    memory: MemorySpec = MemorySpec()
    eval: EvalSpec = EvalSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="after")
    def _combination_exists(self) -> Self:
        if isinstance(self.tuning, FullTuning) and not isinstance(self.quantization, NoQuantization):
            raise ValueError("full tuning can't train quantized weights: use tuning lora, or quantization none")
        if isinstance(self.quantization, Nf4Quantization) and self.memory.precision == "fp16":
            raise ValueError("nf4 with fp16 compute is not offered: use bf16, fp32 or auto")
        return self


def upgrade_spec(stored: dict[str, Any]) -> JobSpec:
    """A stored spec, of any version ever written, as today's JobSpec. One `if` per version, oldest first."""
    return JobSpec.model_validate(stored)
