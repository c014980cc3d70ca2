"""JobSpec: what a user asks for. Validated once at submit, stored as JSON, handed to the child, never changed.

Unions are told apart by `kind`, so each choice carries only its own fields; unknown fields are refused at any depth.
Units are in the names. Ranges stand in the JSON schema, so the OpenAPI page shows them. A function of the engine takes
the part it needs (`OptimSpec`), never the whole.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from core.presets import PRESETS, fill_in


class Frozen(BaseModel):
    """Strict (no "3" for 3), closed (no unknown field), no NaN or infinity, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# Free text holds no NUL: PostgreSQL has no place for one. (Lone surrogates pydantic refuses itself.)
AdapterName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$")]
DatasetId = Annotated[str, StringConstraints(pattern=r"^ds_[a-z0-9]{8,40}$")]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
ModulePattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_*]{1,63}(\.[A-Za-z0-9_*]{1,63}){0,15}$")]
NewToken = Annotated[str, StringConstraints(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$", max_length=64)]
MetadataKey = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=64)]
MetadataValue = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=512)]


DataKind = Literal["conversation", "preference", "text", "picture_pair", "picture_question", "picture_chat"]
"""What the rows of a dataset are; its format tells. An objective trains on rows of one kind."""


class SftObjective(Frozen):
    """Supervised fine-tuning: cross-entropy on the chosen tokens, mean over all trained tokens of a step."""

    kind: Literal["sft"] = "sft"
    train_on: Literal["last_turn", "all_turns", "everything"] = Field(
        default="all_turns",
        description="Which tokens carry loss: the last assistant turn's, every assistant turn's, or the prompts' as well. "
        "An assistant message of weight 0 never does.",
    )


class PlainTextObjective(Frozen):
    """Continued pre-training: every token of every text. Long texts go on in the next row; nothing of them is cut."""

    kind: Literal["plain_text"] = "plain_text"


class DpoObjective(Frozen):
    """Direct preference optimisation (arXiv 2305.18290) against the base model as it was before training.

    `hinge` is SLiC's loss (2305.10425), `ipo` that of 2310.12036 on log-probabilities averaged over the answer's tokens.
    """

    kind: Literal["dpo"] = "dpo"
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0, le=10, description="How closely the reference is held to.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Share of pairs believed to be swapped (sigmoid only).")

    @model_validator(mode="after")
    def _smoothing_exists(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is defined for the sigmoid loss, not for {self.loss}")
        return self


class OrpoObjective(Frozen):
    """Odds-ratio preference optimisation (arXiv 2403.07691): the chosen answer's loss and the odds ratio, no reference."""

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0, le=10, description="Weight of the odds ratio (lambda in the paper).")


Objective = Annotated[SftObjective | PlainTextObjective | DpoObjective | OrpoObjective, Field(discriminator="kind")]
DATA_KINDS: dict[str, DataKind] = {"sft": "conversation", "plain_text": "text", "dpo": "preference", "orpo": "preference"}
"""Kind of an objective -> the rows it trains on."""


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
    init: Literal["default", "pissa", "olora"] = Field(
        default="default",
        description="Where training starts: from no update, or along the weights' own directions (PiSSA, arXiv 2404.02948; "
        "OLoRA, 2406.01775). These are kept as plain LoRA of twice the rank, so any loader gives the trained model.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).")
    dora: bool = Field(default=False, description="Learn each output's magnitude apart from its direction (arXiv 2402.09353).")
    rank_pattern: dict[ModulePattern, Annotated[int, Field(ge=1, le=512)]] = Field(
        default_factory=dict, max_length=64, description="Other ranks by module path; `*` stands for any one part of it."
    )
    alpha_pattern: dict[ModulePattern, Annotated[float, Field(gt=0, le=4096)]] = Field(
        default_factory=dict, max_length=64, description="Other alphas, likewise."
    )
    lora_plus_ratio: float | None = Field(
        default=None, ge=1, le=1000, description="Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."
    )
    train_embeddings: bool = Field(
        default=False, description="Train input embeddings and output head in full beside the adapters."
    )

    @model_validator(mode="after")
    def _combination_exists(self) -> Self:
        if self.init != "default" and self.dora:
            raise ValueError(f"init {self.init} and dora both decide what a module's update means: choose one")
        return self


class MoraTuning(Frozen):
    """A square matrix per module with as many numbers as LoRA of `rank` has (MoRA, arXiv 2405.12130, its sharing form).

    Kept as the plain LoRA of the square's own rank that it equals.
    """

    kind: Literal["mora"] = "mora"
    rank: int = Field(default=8, ge=1, le=256)
    target_modules: Literal["all-linear"] | list[ModuleName] = Field(
        default="all-linear", description="Names of linear modules, or all of them but the output head."
    )


Tuning = Annotated[LoraTuning | MoraTuning | FullTuning, Field(discriminator="kind")]


class NoQuantization(Frozen):
    kind: Literal["none"] = "none"


class Nf4Quantization(Frozen):
    """4-bit NormalFloat blocks of frozen weights (QLoRA, arXiv 2305.14314)."""

    kind: Literal["nf4"] = "nf4"
    double_quantization: bool = Field(default=True, description="Quantise the block scales too (0.37 bit per weight less).")


class Fp4Quantization(Frozen):
    """4-bit floating-point blocks of frozen weights (arXiv 2212.09720)."""

    kind: Literal["fp4"] = "fp4"
    double_quantization: bool = Field(default=True, description="Quantise the block scales too (0.37 bit per weight less).")


class Int8Quantization(Frozen):
    """8-bit frozen weights, outlier columns of the input apart (LLM.int8(), arXiv 2208.07339)."""

    kind: Literal["int8"] = "int8"


class Fp8Quantization(Frozen):
    """Experimental. 8-bit floats (e4m3, arXiv 2209.05433) of frozen weights, a scale for each output, and of all that they are
    multiplied with, forward and backward, a scale for each token. For speed: on a GPU of compute capability 8.9 or higher; a CPU
    computes the same in fp32."""

    kind: Literal["fp8"] = "fp8"


Quantization = Annotated[
    NoQuantization | Nf4Quantization | Fp4Quantization | Int8Quantization | Fp8Quantization, Field(discriminator="kind")
]


_EIGHT_BITS = (Int8Quantization, Fp8Quantization)


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
    new_tokens: list[NewToken] = Field(
        default_factory=list,
        max_length=1024,
        description="Words that become one token each, wherever they stand in a text. The result is a whole model then, whatever "
        "the tuning: a base that many adapters share has one vocabulary.",
    )

    @model_validator(mode="after")
    def _new_tokens_differ(self) -> Self:
        twice = [token for token, count in Counter(self.new_tokens).items() if count > 1]
        if twice:
            raise ValueError(f"new_tokens names {', '.join(map(repr, twice))} more than once")
        return self


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


class GenerationEval(Frozen):
    """Answers of held-out prompts, compared with the answers that stand in the data."""

    rows: int = Field(default=16, ge=1, le=1000, description="Held-out rows whose last prompt is answered, greedily.")
    max_tokens: int = Field(default=64, ge=1, le=2048)


PanelPrompt = Annotated[str, StringConstraints(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$", max_length=4000)]
EvalMetric = Literal["eval_loss", "eval_reward_accuracy", "eval_exact_match", "eval_bleu", "eval_rouge_l"]


class EarlyStopping(Frozen):
    """End the training when the metric has not got better by `min_delta` over `patience` evaluations in a row."""

    patience: int = Field(default=3, ge=1, le=1000)
    min_delta: float = Field(default=0.0, ge=0, le=1e6)


class EvalSpec(Frozen):
    every_steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Held-out loss every n steps, beside the ones before and after training.",
    )
    generation: GenerationEval | None = Field(default=None, description="Exact match, BLEU and ROUGE-L of generated answers.")
    panel: list[PanelPrompt] = Field(
        default_factory=list, max_length=16, description="Prompts answered at every evaluation, kept as events."
    )
    panel_max_tokens: int = Field(default=64, ge=1, le=2048)
    judge: bool = Field(
        default=False, description="Have the operator's judge model mark answers of the result, 1 to 10; needs generation."
    )
    metric: EvalMetric = Field(default="eval_loss", description="What keep_best and early_stopping go by.")
    keep_best: bool = Field(default=False, description="Hand over the weights of the best evaluation, not the last ones.")
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _metric_is_measured(self) -> Self:
        if self.metric in ("eval_exact_match", "eval_bleu", "eval_rouge_l") and self.generation is None:
            raise ValueError(f"metric {self.metric} is only measured with generation")
        if self.judge and self.generation is None:
            raise ValueError("judge marks generated answers: set generation")
        if self.early_stopping is not None and self.every_steps is None:
            raise ValueError("early_stopping goes by evaluations: set every_steps")
        return self


class CheckpointSpec(Frozen):
    every_steps: int | None = Field(default=100, ge=1, le=1_000_000, description="None: only when asked to stop.")
    keep: int = Field(default=2, ge=1, le=100, description="The newest n are kept.")


class JobSpec(Frozen):
    """One fine-tuning job."""

    spec_version: Literal[1] = 1
    task: Literal["causal_lm"] = "causal_lm"
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
    def _preset_filled_in(cls, given: Any) -> Any:
        # A stored spec holds every field, so that a preset which has changed since changes nothing in it.
        if isinstance(given, dict) and isinstance(given.get("preset"), str) and given["preset"] in PRESETS:
            return fill_in(given["preset"], given)
        return given

    @model_validator(mode="after")
    def _combination_exists(self) -> Self:
        quantized = not isinstance(self.quantization, NoQuantization)
        reasons = []
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
