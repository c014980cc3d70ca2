"""The wire shapes that all surfaces of the inference API share. What is not listed is refused, not ignored: an ignored option
is a wrong answer.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
MODEL_DESCRIPTION = "A base, an adapter's name or id (its latest deployed version), or either with `@version`."


class Strict(BaseModel):
    """Of what is sent. A field that is null is as one that is not there: clients send messages back as they got them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart] = Field(description="Parts are joined as they are.")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Of these tokens the keys and values were in memory, of an earlier request.")


class Usage(BaseModel):
    prompt_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens: int = Field(description="Generated tokens of all choices; the one that ended a turn is counted.")
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "Usage":
        return cls(
            prompt_tokens=prompt,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens=completion,
            total_tokens=prompt + completion,
        )


class ModelLine(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["strop"] = "strop"
    root: str = Field(description="The base model.")
    parent: str | None = Field(description="The base model of an adapter; null for a base.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelLine]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error of every route."""

    error: ErrorObject


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong; `code` and `param` say where."},
    401: {"model": ErrorBody, "description": "No valid API key."},
    403: {"model": ErrorBody, "description": "The key lacks the scope models:infer."},
    404: {"model": ErrorBody, "description": "`model_not_found`: not there, not deployed, or another project's."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "Too many requests wait; `Retry-After` says for how long."},
    500: {"model": ErrorBody, "description": "The endpoint failed."},
    503: {"model": ErrorBody, "description": "Not ready, or the model is being loaded; see `Retry-After`."},
}
