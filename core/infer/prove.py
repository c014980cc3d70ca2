"""The numbers of the parity record, as packed steps make them: what `core.eval.probes.measure` is for peft."""

from collections.abc import Sequence

import torch

from core.eval.probes import Known, Said, said_of
from core.infer.lora import LoraWeights
from core.infer.runner import Runner
from core.models.traces import Trace


@torch.inference_mode()
def measure_packed(
    runner: Runner, batch: Sequence[Known], weights: LoraWeights | None, *, is_traced: bool
) -> tuple[list[Said], dict[str, Trace]]:
    """What is said of each sequence, by the base or with an adapter; and, traced, what each of its modules added."""
    with runner.sites.tracing() as traces:
        said = [said_of(runner.score(ids, weights), ids, start) for ids, start in batch]
    return said, traces if is_traced else {}
