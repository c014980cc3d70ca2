"""What a request may say about how its answer is made, in OpenAI's and vLLM's names, the same on every surface."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from core.infer.sampling import Sampling
from serving.schemas import Strict

MAX_STOPS = 4
MAX_BIASES = 1024
MAX_TOKENS = 1_048_576
DEFAULT_MAX_TOKENS = 256

StopString = Annotated[str, StringConstraints(min_length=1, max_length=64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIdText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(Strict):
    """The defaults are the model's own distribution, whole."""

    temperature: float = Field(default=1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=2**31, description="0 or -1: all.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Least probability, as a share of the likeliest token's.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10, description="Over prompt and answer; 1: none.")
    logit_bias: dict[TokenIdText, Bias] = Field(
        default_factory=dict, max_length=MAX_BIASES, description="Token id to what is added to its logit, after the penalties."
    )
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer.")
    stop: StopString | list[StopString] | None = Field(
        default=None, description=f"Up to {MAX_STOPS} strings that end the answer; they are not part of it."
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=64, description="Ids that end the answer too.")
    include_stop_str_in_output: bool = Field(default=False, description="What ended the answer is part of its text.")
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS, description="Nothing ends the answer before.")
    ignore_eos: bool = Field(default=False, description="The model's own end of turn does not end the answer.")
    stream: bool = Field(default=False, description="Server-sent events: one chunk per piece of text, then `[DONE]`.")
    return_token_ids: bool = Field(default=False, description="Ids of the prompt and of the answer.")

    @model_validator(mode="after")
    def _few_stops(self) -> Self:
        if len(self.stop_strings) > MAX_STOPS:
            raise ValueError(f"stop holds {len(self.stop_strings)} strings; {MAX_STOPS} are the limit")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, max_tokens: int, top_logprobs: int) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            seed=self.seed,
            stop=self.stop_strings,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop=self.include_stop_str_in_output,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            top_logprobs=top_logprobs,
        )
