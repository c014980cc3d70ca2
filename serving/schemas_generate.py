"""`POST /generate`: our own shape, and that of text-generation-inference and LoRAX (`inputs` and `parameters`)."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from core.infer.progress import FinishReason
from serving.schemas import MODEL_DESCRIPTION, Messages, ModelName, Strict, Usage
from serving.schemas_sampling import DEFAULT_MAX_TOKENS, MAX_STOPS, MAX_TOKENS, SamplingFields, StopString


class GenerateRequest(SamplingFields):
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

    model: ModelName = Field(description=MODEL_DESCRIPTION)
    prompt: str | None = Field(default=None, min_length=1)
    messages: Messages | None = None
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description=f"Default: {DEFAULT_MAX_TOKENS}, or what the context has room for."
    )
    logprobs: bool = Field(
        default=False, description="Log-probability of each token, in nats: the model's own, before temperature and filters."
    )

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


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


class InputsParameters(Strict):
    """Greedy unless `do_sample`, or one of temperature, top_k and top_p, asks for more."""

    model: ModelName | None = Field(default=None, description=f"{MODEL_DESCRIPTION} Default: the endpoint's first base.")
    adapter_id: str | None = Field(default=None, max_length=256, description="The same as `model`; empty: the base.")
    max_new_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    do_sample: bool = False
    temperature: float | None = Field(default=None, gt=0, le=2)
    top_k: int | None = Field(default=None, ge=1, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    stop: list[StopString] = Field(default_factory=list, max_length=MAX_STOPS)
    return_full_text: bool = Field(default=False, description="The prompt stands before the answer.")
    details: bool = Field(default=False, description="Tokens, log-probabilities and the reason of the end.")

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.model and self.adapter_id and self.model != self.adapter_id:
            raise ValueError("model and adapter_id name two models")
        return self


class InputsRequest(Strict):
    inputs: str = Field(min_length=1, description="Read as it is, special tokens included.")
    parameters: InputsParameters = Field(default_factory=InputsParameters)

    def as_generate(self, base: str) -> GenerateRequest:
        """The same in our own shape; `base` answers where no model is named."""
        asked = self.parameters
        is_drawn = asked.do_sample or any(one is not None for one in (asked.temperature, asked.top_k, asked.top_p))
        return GenerateRequest(
            model=asked.model or asked.adapter_id or base,
            prompt=self.inputs,
            max_tokens=asked.max_new_tokens,
            temperature=(asked.temperature or 1.0) if is_drawn else 0.0,
            top_k=asked.top_k or 0,
            top_p=asked.top_p or 1.0,
            repetition_penalty=asked.repetition_penalty,
            frequency_penalty=asked.frequency_penalty,
            seed=asked.seed,
            stop=list(asked.stop) or None,
        )


class InputsToken(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool


class InputsDetails(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[InputsToken] = []
    tokens: list[InputsToken]


class InputsResponse(BaseModel):
    generated_text: str
    model: str = Field(description="What answered: a base, or adapter@version.")
    details: InputsDetails | None = Field(default=None, description="With details.")


def _shape(body: Any) -> str:
    return (
        "inputs and parameters"
        if isinstance(body, InputsRequest) or (isinstance(body, dict) and "inputs" in body)
        else "prompt or messages"
    )


# The tags are no identifiers, by which errors tell them from fields.
AnyGenerateRequest = Annotated[
    Annotated[GenerateRequest, Tag("prompt or messages")] | Annotated[InputsRequest, Tag("inputs and parameters")],
    Discriminator(_shape),
]
