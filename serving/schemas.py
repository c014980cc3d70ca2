"""The wire shapes of the inference API. What is not listed is refused, not ignored: an ignored option is a wrong answer."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from core.infer.progress import FinishReason

MAX_STOPS = 4
DEFAULT_MAX_TOKENS = 256

StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ChatMessage(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class GenerateRequest(_Strict):
    """Exactly one of `prompt` (read as it is, special tokens included) and `messages` (put into the model's chat template)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "SmolLM2-135M-Instruct",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_tokens": 32,
                    "temperature": 0,
                }
            ]
        }
    )

    model: str = Field(
        min_length=1,
        max_length=256,
        description="A base, an adapter's name or id (its latest deployed version), or either with `@version`.",
    )
    prompt: str | None = Field(default=None, min_length=1)
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=1000)
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description=f"Default: {DEFAULT_MAX_TOKENS}, or what the context has room for.",
    )
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer.")
    stop: StopString | list[StopString] | None = Field(
        default=None, description=f"Up to {MAX_STOPS} strings that end the answer; they are not part of it."
    )
    stream: bool = Field(default=False, description="Server-sent events: one chunk per piece of text, then `[DONE]`.")
    logprobs: bool = Field(
        default=False, description="Log-probability of each token, in nats: the model's own, before temperature and top_p."
    )
    return_token_ids: bool = Field(default=False, description="Ids of the prompt and of the answer.")

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        if len(self.stop_strings) > MAX_STOPS:
            raise ValueError(f"stop holds {len(self.stop_strings)} strings; {MAX_STOPS} are the limit")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int = Field(description="Generated tokens; the one that ended the turn is counted.")
    total_tokens: int


class GenerateResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="What answered: a base, or adapter@version.")
    text: str
    finish_reason: FinishReason
    usage: Usage
    prompt_token_ids: list[int] | None = Field(default=None, description="With return_token_ids.")
    token_ids: list[int] | None = Field(default=None, description="With return_token_ids.")
    logprobs: list[float] | None = Field(default=None, description="With logprobs; one per generated token.")


class GenerateChunk(BaseModel):
    """One `data:` line of a stream. `finish_reason` and `usage` are set in the last; ids and log-probabilities as asked."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None


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
