"""Which rows a job reads, and how they become tokens."""

from collections import Counter
from typing import Literal, Self

from pydantic import Field, model_validator

from core.spec.frozen import DatasetId, Frozen, NewToken


class DatasetRef(Frozen):
    dataset_id: DatasetId
    weight: float = Field(default=1.0, gt=0, le=100, description="Passes over this dataset per epoch.")


class DataSpec(Frozen):
    datasets: list[DatasetRef] = Field(min_length=1, max_length=32)
    template: Literal["model", "chatml", "alpaca"] = Field(
        default="model", description="Chat template: the model's own (ChatML where it has none), or one by name."
    )
    max_length: int = Field(
        default=512,
        ge=8,
        le=131072,
        description="Tokens per row; what is over is cut from the end. Captions keep their end token, and are never longer than "
        "what the model reads.",
    )
    eval_rows: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Rows held out of training, chosen by the seed; of captioned pictures so many pictures.",
    )
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
