"""The whole spec, and which of its parts go together."""

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from core.catalog import Task
from core.presets import PRESETS, fill_in
from core.spec.course import BatchSpec, CheckpointSpec, MemorySpec, OptimSpec, ScheduleSpec
from core.spec.data import DataSpec
from core.spec.evaluation import EvalSpec
from core.spec.frozen import AdapterName, Frozen, MetadataKey, MetadataValue, ModelName
from core.spec.objectives import DATA_KINDS, OBJECTIVES, InfoNceObjective, Objective, SftObjective
from core.spec.pictures import PictureSpec
from core.spec.tuning import (
    Fp8Quantization,
    FullTuning,
    Int8Quantization,
    LoraTuning,
    MoraTuning,
    NoQuantization,
    ProjectionTuning,
    Quantization,
    Tuning,
)

_EIGHT_BITS = (Int8Quantization, Fp8Quantization)
_RECALLS = ("eval_image_to_text_recall_at_1", "eval_text_to_image_recall_at_1")


class JobSpec(Frozen):
    """One fine-tuning job."""

    spec_version: Literal[1] = 1
    task: Task = Field(
        default="causal_lm", description="causal_lm: models of text; contrastive: models of pictures and their captions (CLIP)."
    )
    preset: Literal["guide-full", "guide-lora", "guide-qlora"] | None = Field(
        default=None, description="Settings to begin from (core/presets.py); what the job says itself stands."
    )
    base_model: ModelName
    adapter_name: AdapterName | None = Field(
        default=None,
        description="Name of the result; an existing name gets a new version. Default: made from the job's id.",
    )
    objective: Objective = SftObjective()
    tuning: Tuning = LoraTuning()
    pictures: PictureSpec | None = Field(default=None, description="Of tasks with pictures only; null is its defaults.")
    quantization: Quantization = NoQuantization()
    data: DataSpec
    optim: OptimSpec = OptimSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    batch: BatchSpec = BatchSpec()
    memory: MemorySpec = MemorySpec()
    eval: EvalSpec = EvalSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        """From the preset, and the task's own objective. A stored spec holds every field: defaults that have changed since
        change nothing in it."""
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("task"), str) and given["task"] in OBJECTIVES and "objective" not in given:
            given = given | {"objective": {"kind": OBJECTIVES[given["task"]][0]}}
        if isinstance(given.get("preset"), str) and given["preset"] in PRESETS:
            return fill_in(given["preset"], given)
        return given

    @model_validator(mode="after")
    def _combination_exists(self) -> Self:
        quantized = not isinstance(self.quantization, NoQuantization)
        reasons = []
        if self.objective.kind not in OBJECTIVES[self.task]:
            reasons.append(f"task {self.task} has no objective {self.objective.kind}: use {' or '.join(OBJECTIVES[self.task])}")
        if self.task == "contrastive":
            reasons += self._unpaired()
        else:
            reasons += self._pictureless()
        if isinstance(self.tuning, FullTuning) and quantized:
            reasons.append("full tuning can't train quantized weights: use tuning lora or mora, or quantization none")
        if isinstance(self.tuning, LoraTuning) and self.tuning.train_embeddings and quantized:
            reasons.append("train_embeddings with a quantized base is not offered: use quantization none")
        if self.data.new_tokens and quantized:
            reasons.append("data.new_tokens makes a whole model, which a quantized base can't be part of: use quantization none")
        if isinstance(self.tuning, LoraTuning) and self.tuning.dora and isinstance(self.quantization, _EIGHT_BITS):
            kind = self.quantization.kind
            reasons.append(f"dora reads its base's weights in every step, which {kind} ones do not allow: use nf4 or fp4")
        if quantized and self.memory.compile:
            reasons.append("compile with a quantized base is not offered: it may keep every dequantized weight in memory")
        if self.memory.fused_layers:
            reasons += [f"fused_layers {reason}" for reason in self._unfused()]
        if quantized and self.memory.precision == "fp16":
            reasons.append(f"{self.quantization.kind} with fp16 compute is not offered: use bf16, fp32 or auto")
        if self.eval.metric in _RECALLS and self.task != "contrastive":
            reasons.append(f"metric {self.eval.metric} is only measured for task contrastive")
        if self.eval.metric == "eval_reward_accuracy" and DATA_KINDS[self.objective.kind] != "preference":
            reasons.append("metric eval_reward_accuracy is only measured for preferences (dpo, orpo)")
        if self.eval.generation is not None and DATA_KINDS[self.objective.kind] != "conversation":
            reasons.append("eval.generation compares answers and needs conversations (sft)")
        if self.eval.generation is not None and getattr(self.objective, "train_on", None) == "everything":
            reasons.append("eval.generation compares answers, and train_on everything hides where they begin")
        for name in ("generation", "panel", "keep_best", "early_stopping"):
            if getattr(self.eval, name) and not self.data.eval_rows:
                reasons.append(f"eval.{name} goes by evaluations: set data.eval_rows")
        if reasons:
            raise ValueError("; ".join(reasons))
        return self

    def _pictureless(self) -> Iterator[str]:
        """What a model of text knows nothing of."""
        if isinstance(self.tuning, ProjectionTuning):
            yield f"tuning projection is for task contrastive, not {self.task}"
        if self.pictures is not None:
            yield f"pictures is for task contrastive, not {self.task}"

    def _unpaired(self) -> Iterator[str]:
        """What a model of two towers, or a loss over a whole step of pairs, knows nothing of."""
        if isinstance(self.tuning, MoraTuning):
            yield "task contrastive has no tuning mora: use full, projection or lora"
        if isinstance(self.tuning, LoraTuning):
            if self.tuning.train_embeddings:
                yield "train_embeddings is for models of text"
            if isinstance(self.objective, InfoNceObjective) and self.objective.learn_temperature:
                yield "a LoRA adapter has no place for a temperature: leave learn_temperature out, or tune full or projection"
        if not isinstance(self.quantization, NoQuantization):
            yield f"task contrastive has no quantization {self.quantization.kind}: use none"
        if self.data.template != "model":
            yield "captions are not put into a template: leave data.template model"
        if self.data.new_tokens:
            yield "task contrastive has no data.new_tokens"
        if self.data.eval_rows == 1:
            yield "a single held-out picture has nothing to be told from: set data.eval_rows 2 or more, or 0"
        if self.batch.step_rows < 2:
            yield "a pair alone has nothing to be told from: set batch.rows_per_step 2 or more"
        if self.batch.micro_batch_size == "auto":
            yield "micro_batch_size auto goes by the plan, which knows nothing of task contrastive: set a number"
        if self.batch.packing == "on":
            yield "captions are not packed: leave batch.packing auto"
        if self.batch.group_by_length:
            yield "group_by_length would decide which pairs are told apart: leave it out"
        for lever in ("checkpointing", "compile", "fused_layers"):
            if getattr(self.memory, lever):
                yield f"task contrastive has no memory.{lever}: a smaller micro_batch_size takes less memory too"
        if self.eval.panel:
            yield "eval.panel asks for answers, and task contrastive gives none"

    def _unfused(self) -> Iterator[str]:
        """What fused layers know nothing of."""
        if isinstance(self.tuning, MoraTuning):
            yield "have no MoRA"
        if isinstance(self.tuning, LoraTuning) and self.tuning.dora:
            yield "have no DoRA"
        if isinstance(self.tuning, LoraTuning) and self.tuning.dropout > 0:
            yield f"have no dropout: set tuning.dropout 0, not {self.tuning.dropout:g}"
        if isinstance(self.quantization, Int8Quantization):
            yield "have no int8 weights: use nf4, fp4, fp8 or none"
        if DATA_KINDS[self.objective.kind] == "preference":
            yield f"serve sft and plain_text, not {self.objective.kind}"
        if self.batch.packing == "off":
            yield "need packed rows: leave batch.packing auto"
        if self.memory.compile:
            yield "compile what they need themselves: leave memory.compile off"


def with_rows_at_once(spec: JobSpec, rows: int) -> JobSpec:
    """The spec with a decided micro-batch; a step keeps its rows."""
    batch = spec.batch.model_copy(
        update={"micro_batch_size": rows, "gradient_accumulation_steps": 1, "rows_per_step": spec.batch.step_rows}
    )
    return spec.model_copy(update={"batch": batch})


def upgrade_spec(stored: dict[str, Any]) -> JobSpec:
    """A stored spec, of any version ever written, as today's JobSpec. One `if` per version, oldest first."""
    return JobSpec.model_validate(stored)
