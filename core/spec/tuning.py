"""Which weights train, and in what precision the frozen ones are held."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.spec.frozen import Frozen, ModuleName, ModulePattern


class FullTuning(Frozen):
    """Every weight is trained."""

    kind: Literal["full"] = "full"


class ProjectionTuning(Frozen):
    """Of a model of two towers the projections into their common space alone, and the temperature where it learns."""

    kind: Literal["projection"] = "projection"


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


Tuning = Annotated[LoraTuning | MoraTuning | FullTuning | ProjectionTuning, Field(discriminator="kind")]


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
