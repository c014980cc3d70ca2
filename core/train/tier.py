"""The tier of a run: plain (padded rows, transformers' own attention and layers; any model) or packed (rows end to end, fused
kernels where liger has them for the family). Chosen by job and model, then put to the test.

Before a packed run's first step a few of its rows go through both tiers. Where loss or gradient differ by more than rounding,
the run is built again on the plain tier and says so: a fast wrong gradient looks like learning.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from core.catalog import Tier, can_pack
from core.errors import BadSpec
from core.eval.evaluate import ExampleLosses
from core.eval.layout import Layout, Packed, Padded
from core.eval.rows import Example, MicroBatch
from core.models.documents import DOCUMENTS
from core.models.load import ComputeDtype
from core.spec import JobSpec

_PLAIN_ATTENTION = "sdpa"
_LOSS_TOLERANCE: dict[ComputeDtype, float] = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
_GRADIENT_TOLERANCE: dict[ComputeDtype, float] = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 2e-2}
"""Relative, and never below _NOISE times what rounding does to this model's gradient. Two engines in bf16 were measured
1.5e-2 apart on a trained 1.1B, and 1e-1 on a 7B of random weights."""
_NOISE = 3.0
_GRADIENT_AT_MOST = 0.3
"""However noisy a model is: a gradient further away than that leads elsewhere."""
_DTYPES: dict[ComputeDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Choice:
    tier: Tier
    reason: str


def choose_tier(spec: JobSpec, config: Any, device: torch.device, compute: ComputeDtype) -> Choice:
    """What job, model and device allow; `config` is the model's. Raises BadSpec when packing is asked for and can't be."""
    if spec.batch.packing == "off":
        return Choice("plain", "batch.packing is off")
    obstacle = _obstacle(spec, config, device, compute)
    if obstacle is None:
        return Choice("packed", f"{config.model_type} attends to packed rows one by one")
    if spec.batch.packing == "on":
        raise BadSpec(f"batch.packing: on, but {obstacle}")
    if spec.memory.fused_layers:
        raise BadSpec(f"memory.fused_layers: {obstacle}")
    return Choice("plain", obstacle)


def layout_of(spec: JobSpec, tier: Tier) -> Layout:
    """Fused layers take what the packed tier takes."""
    if tier == "plain":
        return Padded(spec.batch.rows_at_once)
    return Packed(spec.batch.rows_at_once * spec.data.max_length)


def enter_packed(model: Any, device: torch.device, *, with_liger: bool = True) -> str:
    """Switch a model to packed attention and, on a GPU, to liger's kernels for its family. Returns what was done.

    `with_liger` is false where a compiler makes the kernels: it can't read liger's norms.
    """
    causal_lm = _causal_lm(model)
    causal_lm.set_attn_implementation(DOCUMENTS)
    if device.type != "cuda" or not with_liger or importlib.util.find_spec("liger_kernel") is None:
        return "packed attention"
    monkey_patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    if causal_lm.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return "packed attention; liger has no kernels for this family"
    # Its fused head would compute all rows of the logits; ours computes those that carry loss.
    monkey_patch._apply_liger_kernel_to_instance(causal_lm, cross_entropy=False, fused_linear_cross_entropy=False)
    return "packed attention and liger kernels"


@contextlib.contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Around passes that are not a packed batch: answers, and the record of what a loader will see."""
    causal_lm = _causal_lm(model)
    before = causal_lm.config._attn_implementation
    if before != DOCUMENTS:
        yield
        return
    causal_lm.set_attn_implementation(_PLAIN_ATTENTION)
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(before)


@contextlib.contextmanager
def restored_on_failure(model: Any) -> Iterator[None]:
    """liger replaces names in the family's module for the whole process; put them back when the packed tier is given up."""
    module = sys.modules[type(_causal_lm(model)).__module__]
    saved = dict(vars(module))
    try:
        yield
    except PackingMismatch:
        for name, value in saved.items():
            setattr(module, name, value)
        raise


class PackingMismatch(Exception):
    """The two tiers disagree; the message holds the numbers."""


@dataclass(frozen=True)
class Probe:
    """What is compared: loss per term, and the gradient of every trainable parameter, of a few rows, without dropout."""

    loss: float
    gradients: dict[str, torch.Tensor]  # fp32, in the host's memory: three of them must not decide a run's peak


def measure(
    model: Any,
    examples: Sequence[Example],
    layout: Layout,
    *,
    loss: Callable[[Any, MicroBatch], ExampleLosses],
    device: torch.device,
    compute: Callable[[], AbstractContextManager[Any]],
) -> Probe:
    """One forward and backward pass of a model in training, without dropout. Leaves modes and gradients as it found them (none).

    Dropout alone is switched off: in eval mode layers are not recomputed, and a model that fits only if they are would not fit.
    """
    drops = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    for module in drops:
        module.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, terms = 0.0, 0
    for micro_batch in layout.split(examples):
        with compute():
            found = loss(model, layout.collate(micro_batch, device))
        found.sums.sum().backward()
        total += float(found.sums.detach().sum())
        terms += int(found.terms.sum())
    gradients = {
        name: p.grad.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items() if p.grad is not None
    }
    for parameter in parameters.values():
        parameter.grad = None
    for module in drops:
        module.train()
    return Probe(total / terms, gradients)


@contextlib.contextmanager
def rounded_otherwise(model: Any, device: torch.device, compute: ComputeDtype) -> Iterator[None]:
    """Every layer's input is off by up to half a unit in its last place, as it would be in an engine that adds in another order.

    What that does to a gradient is the model's own noise: 2e-3 here, 1e-1 there. No two engines agree better.
    """
    half = torch.finfo(_DTYPES[compute]).eps / 2

    def nudge_with(seed: int) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
        def nudge(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *others = arguments
            chance = torch.Generator(device).manual_seed(seed)  # its own: the run's stands where it stood
            off = torch.empty(hidden.shape, device=device).uniform_(1 - half, 1 + half, generator=chance)
            return (hidden * off).to(hidden.dtype), *others

        return nudge

    layers = _causal_lm(model).get_decoder().layers
    hooks = [layer.register_forward_pre_hook(nudge_with(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def assert_agreement(plain: Probe, again: Probe, other: Probe, tier: Tier, compute: ComputeDtype) -> str:
    """The measured differences as a sentence. `again` is the plain tier `rounded_otherwise`, `other` a pass on `tier`.

    Raises PackingMismatch.
    """
    missing = plain.gradients.keys() ^ other.gradients.keys()
    loss, gradient = _apart(plain, other)
    _, noise = _apart(plain, again)
    said = f"loss {plain.loss:.5f} plain, {other.loss:.5f} {tier}; gradients {gradient:.1e} apart (rounding: {noise:.1e})"
    allowed = max(_GRADIENT_TOLERANCE[compute], min(_NOISE * noise, _GRADIENT_AT_MOST))
    if missing or not (loss <= _LOSS_TOLERANCE[compute] and gradient <= allowed):
        raise PackingMismatch(said + (f"; {len(missing)} parameters have a gradient in one tier only" if missing else ""))
    return said


def assert_rounding_is_bearable(exact: Probe, rounded: Probe) -> str:
    """What rounding all that fp8 weights are multiplied with does, as a sentence.

    Raises BadSpec where the gradient is further away than no gradient at all would be.
    """
    loss, gradient = _apart(exact, rounded)
    said = f"8-bit rows move the loss by {loss:.1e} and the gradients by {gradient:.1e}"
    if not gradient < 1:
        raise BadSpec(f"quantization.kind: fp8 is too coarse for this model: {said} of themselves; use nf4 or none")
    return said


def _apart(one: Probe, other: Probe) -> tuple[float, float]:
    """(loss, gradient), each relative to the first probe's; parameters with a gradient in both."""
    norm = sum(float(g.pow(2).sum()) for g in one.gradients.values()) ** 0.5
    both = one.gradients.keys() & other.gradients.keys()
    apart = sum(float((other.gradients[name] - one.gradients[name]).pow(2).sum()) for name in both) ** 0.5
    return abs(other.loss - one.loss) / max(abs(one.loss), 1e-6), apart / max(norm, 1e-12)


def _obstacle(spec: JobSpec, config: Any, device: torch.device, compute: ComputeDtype) -> str | None:
    if device.type == "cuda" and compute == "fp32":
        return "the GPU's packed attention needs bf16 or fp16"
    architecture = (config.architectures or ["unknown"])[0]
    return can_pack(architecture, config.to_dict(), spec.data.max_length)


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
