"""How far what is loaded here may be from what was trained, and the refusal of what is further.

In fp32 on a CPU the same operations give the same numbers but for their order, and the limit is absolute. Elsewhere kernels
round differently, and limits are shares of the recorded numbers. LLM.int8 rounds even where it computes in fp32.
"""

from dataclasses import dataclass
from typing import Any

from core.adapter import PARITY_FILE, BaseIdentity
from core.errors import StropError
from store.deployments import Check

UNMEASURABLE = 1e-5
"""What a module adds below this share of its output may be rounding: sums that cancel, as an init's frozen pair does."""


class Refused(StropError):
    """Carries the failed check."""

    def __init__(self, check: str, numbers: dict[str, Any]) -> None:
        super().__init__(check)
        self.check = Check(check, False, numbers)


@dataclass(frozen=True)
class Allowed:
    """How far two loaders of one adapter may be apart. Shares of the recorded numbers, but for absolute `logits`."""

    logits: float
    is_absolute: bool
    module: float
    sample: float
    distance: float


_EXACT = Allowed(logits=1e-4, is_absolute=True, module=1e-3, sample=1e-2, distance=1e-5)
_SINGLE = Allowed(logits=1e-3, is_absolute=False, module=1e-2, sample=5e-2, distance=1e-3)
_HALF = Allowed(logits=2e-2, is_absolute=False, module=5e-2, sample=0.25, distance=1e-2)


def allowed(trained_on: BaseIdentity, trained_at: str, device: str) -> Allowed:
    """For an adapter of a base, measured on a device of one type and served on one of another."""
    if trained_on.compute_dtype != "fp32" or trained_on.quantization in ("int8", "fp8"):
        return _HALF
    return _EXACT if trained_at == device == "cpu" else _SINGLE


def unusable(what: str) -> Refused:
    """The refusal of a record that says nothing."""
    return Refused("parity", {"reason": f"{PARITY_FILE}: {what}"})


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """JSON, and so a receipt, has no NaN and no infinity."""
    return {
        name: str(value) if isinstance(value, float) and not abs(value) < float("inf") else value
        for name, value in numbers.items()
    }
