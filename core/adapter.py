"""What a finished job hands over, and which base it belongs to.

An adapter is a folder that peft (for LoRA) or transformers (for a full model) reads as it is, with tokenizer, chat
template, training config and `parity.json` beside the weights, closed by a manifest. Its content digest is its version.
"""

from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from core.catalog import Task

Quantization = Literal["none", "nf4", "nf4-double", "fp4", "fp4-double", "int8", "fp8"]
"""How frozen linear weights are held: as they are, in 4-bit blocks (with `double`, their scales in 8 bit), or in 8 bit.

`fp8` also says how they are multiplied: what a layer reads is rounded too."""

ADAPTER_KIND = "adapter"
"""`kind` in the manifest of an adapter folder."""

PARITY_FILE = "parity.json"


class BaseIdentity(BaseModel):
    """The frozen weights a result was trained on, as exactly as it matters: an endpoint serves an adapter only on its equal.

    `weights` digests names, dtypes and bytes of all tensors; NF4 of the same weights is a different base, and so is another
    compute dtype, since both change the numbers an adapter saw.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="The registered name, for people; not part of the comparison.")
    weights: str
    quantization: Quantization = "none"
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    def matches(self, other: "BaseIdentity") -> bool:
        return (self.weights, self.quantization, self.compute_dtype) == (
            other.weights,
            other.quantization,
            other.compute_dtype,
        )

    def __str__(self) -> str:
        return f"{self.model} (weights {self.weights[:12]}, quantization {self.quantization}, compute {self.compute_dtype})"


class ParitySummary(BaseModel):
    """What a parity record holds, in short, for people. Losses are nats per token over all probes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    probes: int
    tokens: int
    loss: float
    base_loss: float | None = Field(description="Of the bare base; null where new tokens keep it from being asked.")
    modules: int = Field(description="That the adapter changes; 0 for a full model.")
    inert: list[str] = Field(description="Modules whose weights add nothing.")


class AdapterFacts(BaseModel):
    """The `facts` of an adapter's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task = "causal_lm"
    tuning: Literal["lora", "mora", "full"] = Field(description="full: a whole model, whatever part of it was trained.")
    base: BaseIdentity
    job_id: str | None = Field(description="Null for an adapter that was trained elsewhere and imported.")
    attempt: int
    step: int
    rank: int | None = Field(description="Largest LoRA rank in the folder; null for a full model.")
    template: str = Field(description="Digest of the chat template it was trained with; empty where texts stand in none.")
    eval_loss: float | None
    parity: ParitySummary | None = Field(default=None, description="Null for results from before version 2 of the record.")


class ParityProbe(BaseModel):
    """One sequence with the log-probabilities the trained model gave it, computed as a loader of the saved folder would.

    `token_ids` is the whole sequence (prompt and completion); `logprobs[i]` is log p(token_ids[start + i] | what precedes),
    for the trained model and for the bare base, so that an adapter that loads but does nothing is told apart. The base has
    none where the sequence holds new tokens that are not in its vocabulary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: list[int] = Field(min_length=2)
    start: int = Field(ge=1)
    logprobs: list[float]
    base_logprobs: list[float]


class TopLogits(BaseModel):
    """The largest logits that follow one token of a probe, largest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: int = Field(ge=0, description="Of the token they follow; the last one's follow the whole probe.")
    ids: list[int] = Field(min_length=2)
    logits: list[float] = Field(min_length=2)


class Probe(ParityProbe):
    """A probe with the model's logits after its last tokens, which show what log-probabilities of fixed tokens may hide."""

    text: str | None = Field(description="What the ids decode to, where encoding it gives the same ids again.")
    top: list[TopLogits] = Field(min_length=1)
    base_distance: float | None = Field(
        description="|trained - base| / |base| over these logits; null where the base can't be asked."
    )


class ModuleTrace(BaseModel):
    """What an adapter adds to the output of one module while the first probe runs through it alone.

    `rms` is its root mean square over all tokens and outputs, `output_rms` that of the module's output without the adapter,
    `sample` a few outputs of what is added at the last token, spread evenly: two modules whose weights changed places may
    agree in size, in their samples they don't. A module that no token reached has 0 and no sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="In the plain model.")
    kind: Literal["lora", "dora", "whole"] = Field(description="`whole`: a copy takes the module's place (modules_to_save).")
    inert: bool = Field(description="Its weights add nothing to any input.")
    rms: float
    output_rms: float
    sample: list[float]


class ParityRecordV1(BaseModel):
    """The record of results made before version 2. Readable and servable for good."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    device: str
    compute_dtype: str
    probes: list[ParityProbe] = Field(min_length=1)


class ParityRecord(BaseModel):
    """Proof of what was trained. The endpoint reproduces it before the adapter becomes routable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    device: str
    compute_dtype: Literal["bf16", "fp16", "fp32"]
    base: BaseIdentity
    template: str = Field(description="Digest of the chat template.")
    modules: list[ModuleTrace] = Field(description="In the order that a token meets them; none for a full model.")
    probes: list[Probe] = Field(min_length=1)

    def summary(self) -> ParitySummary:
        logprobs = [value for probe in self.probes for value in probe.logprobs]
        base_logprobs = [value for probe in self.probes for value in probe.base_logprobs]
        is_whole = len(base_logprobs) == len(logprobs)
        return ParitySummary(
            device=self.device,
            probes=len(self.probes),
            tokens=len(logprobs),
            loss=-fmean(logprobs),
            base_loss=-fmean(base_logprobs) if is_whole else None,
            modules=len(self.modules),
            inert=[module.path for module in self.modules if module.inert],
        )


_RECORDS: TypeAdapter[ParityRecordV1 | ParityRecord] = TypeAdapter(
    Annotated[ParityRecordV1 | ParityRecord, Field(discriminator="version")]
)


def read_parity(content: bytes) -> ParityRecordV1 | ParityRecord:
    """The record in a PARITY_FILE, of either version. Raises pydantic's ValidationError."""
    return _RECORDS.validate_json(content)


def tolerance(compute_dtype: str) -> float:
    """Largest mean absolute difference of log-probabilities, in nats, that two loaders of one adapter may show."""
    return {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}[compute_dtype]
