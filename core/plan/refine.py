"""What finished runs say of the plan: their measured peaks correct the next plan of the same kind, on the same kind of device.

Weights, gradients and optimizer states are counted to the byte; what a step keeps and passes is estimated (activations, logits,
workspace), and a miss of the peak is put down to that. A kind is a base model and a way to train it; the record keeps
what each finished run of it measured. The correction is bounded: a run that measured something else may spoil a plan a little.
"""

from collections.abc import Sequence

from core.plan.work import Work
from core.records import MemoryEstimate, Refinement
from core.spec import LoraTuning

RUNS_ASKED = 8
"""The newest of a kind; what is older may have been measured by an older engine."""
LOWEST, HIGHEST = 0.8, 1.5
_FEWEST_TO_LOWER = 3
"""One run is enough to plan with more, not with less: its rows may have been shorter than the next one's."""
_LEAST_SHARE = 0.05
"""Of a plan's total that is estimated; below it, its error is noise."""


def method_of(work: Work) -> str:
    """How a job trains, as far as it decides what a token keeps: tuning and modules, quantisation, tier, recomputation."""
    spec = work.spec
    tuning = "-".join([spec.tuning.kind, *work.adapted])
    if isinstance(spec.tuning, LoraTuning) and spec.tuning.dora:
        tuning += "-dora"
    parts = [spec.objective.kind, tuning, spec.quantization.kind, work.tier, spec.memory.precision, spec.optim.kind]
    if spec.memory.checkpointing:
        parts.append(f"every-{spec.memory.checkpointing_every}" + ("-offload" if spec.memory.checkpointing_offload else ""))
    if spec.memory.compile:
        parts.append("compile")
    return " ".join(parts)


def ratio_of(planned: MemoryEstimate, measured_gib: float) -> float | None:
    """Measured over planned, of the estimated parts; None where they are too small a part to tell.

    `planned` is not refined.
    """
    estimated = _estimated(planned)
    if estimated < _LEAST_SHARE * planned.total_gib:
        return None
    return (measured_gib - (planned.total_gib - estimated)) / estimated


def refinement(ratios: Sequence[float]) -> Refinement | None:
    """What the runs of a kind, the newest first, come to: the highest, as a job that does not fit is worse than room left."""
    newest = ratios[:RUNS_ASKED]
    if not newest:
        return None
    factor = min(max(*newest, LOWEST) if len(newest) >= _FEWEST_TO_LOWER else max(*newest, 1.0), HIGHEST)
    return Refinement(factor=factor, runs=len(newest))


def refined(planned: MemoryEstimate, by: Refinement | None) -> MemoryEstimate:
    """The estimate with its estimated parts corrected."""
    if by is None:
        return planned
    changed = {name: getattr(planned, name) * by.factor for name in _ESTIMATED}
    total = planned.total_gib + (by.factor - 1) * _estimated(planned)
    return planned.model_copy(update=changed | {"total_gib": total})


_ESTIMATED = ("activations_gib", "logits_gib", "workspace_gib")


def _estimated(planned: MemoryEstimate) -> float:
    return sum(float(getattr(planned, name)) for name in _ESTIMATED)
