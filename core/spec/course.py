"""The course of a training: optimizer, schedule, rows per step, memory, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.spec.frozen import Frozen


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


_ROWS_AT_ONCE = 4


class BatchSpec(Frozen):
    """Rows per optimizer step = micro_batch_size × gradient_accumulation_steps, packed or not; or rows_per_step."""

    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        default=_ROWS_AT_ONCE,
        description="Rows in memory at once. auto: as many as the plan says that the worker has room for; needs rows_per_step.",
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=4096, description="Micro-batches per optimizer step.")
    rows_per_step: int | None = Field(
        default=None, ge=1, le=1 << 24, description="Rows per optimizer step, in place of gradient_accumulation_steps."
    )
    packing: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Lay a step's rows end to end without padding, each attending to itself alone. The rows of a step stay the "
        "same; up to micro_batch_size × data.max_length tokens are in memory at once. auto: where the model allows it.",
    )
    group_by_length: bool = Field(
        default=False, description="Steps of rows of like length: less padding where nothing is packed, a less random order."
    )

    @model_validator(mode="after")
    def _rows_are_said_once(self) -> Self:
        if self.micro_batch_size == "auto" and self.rows_per_step is None:
            raise ValueError("micro_batch_size auto needs rows_per_step, which it leaves as it is")
        if self.rows_per_step is not None and self.gradient_accumulation_steps != 1:
            raise ValueError("rows_per_step takes the place of gradient_accumulation_steps: set one of them")
        if self.rows_per_step is not None and self.rows_per_step < self.rows_at_once:
            raise ValueError(f"micro_batch_size ({self.micro_batch_size}) exceeds rows_per_step ({self.rows_per_step})")
        return self

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step."""
        return self.rows_per_step or self.rows_at_once * self.gradient_accumulation_steps

    @property
    def rows_at_once(self) -> int:
        """Rows in memory at once; auto before anyone has decided counts as the default."""
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        return min(_ROWS_AT_ONCE, self.rows_per_step or _ROWS_AT_ONCE)


class MemorySpec(Frozen):
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="Compute precision; auto is bf16 where the device has it, else fp32."
    )
    checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass.")
    checkpointing_every: int = Field(default=1, ge=1, le=64, description="With checkpointing: every n-th layer only.")
    checkpointing_offload: bool = Field(
        default=False, description="With checkpointing: what is kept waits in the computer's memory, not the GPU's."
    )
    compile: bool = Field(default=False, description="torch.compile each decoder layer: a slower start, faster steps.")
    fused_layers: bool = Field(
        default=False,
        description="Over packed rows: decoder layers of our own, which keep half as much for the backward pass and compile at "
        "the start of a run (Llama, Qwen2, Qwen3, GLM, GLM-4).",
    )

    @model_validator(mode="after")
    def _levers_have_a_hold(self) -> Self:
        if not self.checkpointing and (self.checkpointing_every != 1 or self.checkpointing_offload):
            raise ValueError("checkpointing_every and checkpointing_offload need checkpointing")
        return self


class CheckpointSpec(Frozen):
    every_steps: int | None = Field(default=100, ge=1, le=1_000_000, description="None: only when asked to stop.")
    keep: int = Field(default=2, ge=1, le=100, description="The newest n are kept.")
