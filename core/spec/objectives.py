"""What is trained towards, and on rows of which kind."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.catalog import Task
from core.spec.frozen import Frozen

DataKind = Literal["conversation", "preference", "text", "picture_pair", "picture_question", "picture_chat"]
"""What the rows of a dataset are; its format tells. An objective trains on rows of one kind."""

PICTURE_KINDS: tuple[DataKind, ...] = ("picture_pair", "picture_question", "picture_chat")


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


class InfoNceObjective(Frozen):
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020): each picture is told from the captions of all other pairs of its step, and
    each caption from their pictures. Pairs that share a picture or a caption are not each other's negatives."""

    kind: Literal["info_nce"] = "info_nce"
    temperature: float | None = Field(
        default=0.07, ge=0.01, le=10, description="What similarities are divided by at first; null: what the model has."
    )
    learn_temperature: bool | None = Field(
        default=None, description="Train it too; it stays at 0.01 or more. Null: where the result has a place for it (not LoRA)."
    )


Objective = Annotated[
    SftObjective | PlainTextObjective | DpoObjective | OrpoObjective | InfoNceObjective, Field(discriminator="kind")
]
DATA_KINDS: dict[str, DataKind] = {
    "sft": "conversation",
    "plain_text": "text",
    "dpo": "preference",
    "orpo": "preference",
    "info_nce": "picture_pair",
}
"""Kind of an objective -> the rows it trains on."""

OBJECTIVES: dict[Task, tuple[str, ...]] = {"causal_lm": ("sft", "plain_text", "dpo", "orpo"), "contrastive": ("info_nce",)}
"""Task -> the kinds of objectives it has, the default first."""
