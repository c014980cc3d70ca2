"""`POST /v1/chat/completions` in OpenAI's shapes, with vLLM's extras under their names."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.infer.progress import FinishReason
from serving.schemas import MODEL_DESCRIPTION, Messages, ModelName, Strict, Usage
from serving.schemas_sampling import DEFAULT_MAX_TOKENS, MAX_TOKENS, SamplingFields

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20


class StreamOptions(Strict):
    include_usage: bool = Field(default=False, description="One more chunk at the end, without choices, with the usage.")


class ResponseFormat(Strict):
    type: Literal["text"] = Field(description="Formats that constrain the answer are not supported.")


class ChatRequest(SamplingFields):
    """Tools, functions, audio and images are not supported, and refused."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "SmolLM2-135M-Instruct",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_completion_tokens": 32,
                }
            ]
        }
    )

    model: ModelName = Field(description=MODEL_DESCRIPTION)
    messages: Messages
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description=f"Default: {DEFAULT_MAX_TOKENS}, or what the context has room for."
    )
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="The older name; the newer one wins.")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Answers, each from a seed of its own.")
    logprobs: bool = Field(
        default=False, description="Log-probabilities of the tokens, in nats: the model's own, before temperature and filters."
    )
    top_logprobs: int = Field(
        default=0, ge=0, le=MAX_TOP_LOGPROBS, description="With logprobs: the likeliest tokens at each place."
    )
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, max_length=512, description="Taken, and not used.")

    @model_validator(mode="after")
    def _belonging(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8; null for a token that is part of a character.")


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = Field(default=None, description="With return_token_ids.")


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="What answered: a base, or adapter@version.")
    system_fingerprint: str = Field(description="Of base weights, their precision and what answered.")
    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(default=None, description="With return_token_ids.")


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One `data:` line. What was not set is not written: `usage` is there only where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
