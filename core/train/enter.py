"""How a run enters the tier that was chosen for it: a few of its rows go through the plain tier and the other, and where they
agree the model stays as it was made (core.train.tier says how far apart they may be).
"""

from collections.abc import Callable

import torch
from peft import PeftModel

from core.errors import BadSpec
from core.eval.layout import Layout, Padded
from core.events import Warned
from core.models.fp8 import rows_unrounded
from core.spec import JobSpec
from core.train.fused.elementwise import PLAIN, Elementwise
from core.train.fused.install import (
    forget_graphs,
    install_fused,
    install_graphs,
    uninstall_fused,
    uninstall_graphs,
    weights_changed,
)
from core.train.tier import (
    Choice,
    PackingMismatch,
    Probe,
    assert_agreement,
    assert_rounding_is_bearable,
    enter_packed,
    layout_of,
    measure,
    restored_on_failure,
    rounded_otherwise,
)
from core.train.training import Training

_PROBED_EXAMPLES = 4


def enter_packed_tier(training: Training, spec: JobSpec) -> None:
    """Switch to the packed tier after a few of the run's rows have gone through both. Raises PackingMismatch."""
    examples = training.rows.step_rows(1)[:_PROBED_EXAMPLES]

    def measured(layout: Layout) -> Probe:
        with training.adapters_uncast():
            return measure(training.model, examples, layout, loss=training.loss, device=training.device, compute=training.compute)

    with restored_on_failure(training.model), rows_unrounded(training.model):
        one_by_one = Padded(1)  # the plain tier keeps more of a token than any other, and must not decide the run's peak
        plain = measured(one_by_one)
        with rounded_otherwise(training.model, training.device, training.base.compute_dtype):
            again = measured(one_by_one)
        done = enter_packed(training.model, training.device, with_liger=not spec.memory.compile)
        packed = measured(layout_of(spec, "packed"))
        said = assert_agreement(plain, again, packed, "packed", training.base.compute_dtype)
    training.choice = Choice("packed", f"{done}; on the first rows {said}")
    if spec.memory.fused_layers:
        _enter_fused(training, spec, lambda: measured(layout_of(spec, "fused")), plain, again)
    if training.base.quantization == "fp8":
        forget_graphs(training.model)
        rounding = assert_rounding_is_bearable(plain, measured(layout_of(spec, training.choice.tier)))
        training.choice = Choice(training.choice.tier, f"{training.choice.reason}; {rounding}")


def _enter_fused(training: Training, spec: JobSpec, measured: Callable[[], Probe], plain: Probe, again: Probe) -> None:
    """From the packed tier on to fused layers, which are held to the plain tier too; a disagreement is said and undone."""
    try:
        ops = _fused_ops(training.device)
        done = install_fused(training.model, ops, offload=spec.memory.checkpointing_offload)
        training.optimizer.optimizer.register_step_post_hook(lambda *_: weights_changed(training.model))
    except ValueError as error:
        raise BadSpec(f"memory.fused_layers: {error}") from error
    if training.device.type == "cuda":
        torch.cuda.empty_cache()  # what was joined lay in pieces too small for what comes
    try:
        with rows_unrounded(training.model):
            probe, how = _measured_as_graphs(training, measured) if training.device.type == "cuda" else (measured(), "")
        said = assert_agreement(plain, again, probe, "fused", training.base.compute_dtype)
    except PackingMismatch as mismatch:
        uninstall_fused(training.model)
        message = f"the fused layers disagreed with the plain tier, the packed one takes their place: {mismatch}"
        training.warnings.append(Warned(code="fused_mismatch", message=message))
        return
    training.choice = Choice("fused", f"{done}{how}; on the first rows {said}")


def _measured_as_graphs(training: Training, measured: Callable[[], Probe]) -> tuple[Probe, str]:
    """(what was measured, in words how): as graphs if these layers can be recorded, else kernel by kernel."""
    try:
        install_graphs(training.model)
        return measured(), ", started as graphs"
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:  # what torch and CUDA raise where something can't be recorded
        first: BaseException = error
        while first.__context__ is not None:  # ending a recording that failed fails too
            first = first.__context__
        reason = str(first).splitlines()[0]
    uninstall_graphs(training.model)
    training.optimizer.zero_grad()
    return measured(), f", started one by one ({reason})"


def _fused_ops(device: torch.device) -> Elementwise:
    if device.type != "cuda":
        return PLAIN
    from core.train.fused.gpu import ON_GPU  # Triton comes with torch for a GPU, and with no other

    return ON_GPU


def compile_layers(training: Training) -> None:
    """Let torch.compile make a kernel of what it can in each layer. Raises BadSpec."""
    if training.device.type != "cuda":
        raise BadSpec("memory.compile: only offered on a GPU")
    model = training.model.get_base_model() if isinstance(training.model, PeftModel) else training.model
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise BadSpec("memory.compile: this model does not say which of its modules are layers")
    for layer in layers:
        layer.compile(dynamic=True)
