"""What is measured on held-out rows, and what follows from it."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from core.spec.frozen import Frozen


class GenerationEval(Frozen):
    """Answers of held-out prompts, compared with the answers that stand in the data."""

    rows: int = Field(default=16, ge=1, le=1000, description="Held-out rows whose last prompt is answered, greedily.")
    max_tokens: int = Field(default=64, ge=1, le=2048)


PanelPrompt = Annotated[str, StringConstraints(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$", max_length=4000)]
EvalMetric = Literal[
    "eval_loss",
    "eval_reward_accuracy",
    "eval_exact_match",
    "eval_bleu",
    "eval_rouge_l",
    "eval_image_to_text_recall_at_1",
    "eval_text_to_image_recall_at_1",
]


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
