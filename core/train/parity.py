"""The parity record: what a finished result answers, measured as its loader will, so that the loader can be held to it.

Up to sixteen known sequences, short: the numbers of the trained model, of the bare base, and of every module of an adapter
alone. What is measured is the folder, read back, whatever it was trained as. Written into it before its manifest closes; the
endpoint repeats it with `core.eval.probes` before the adapter becomes routable.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from core.adapter import BaseIdentity, ModuleTrace, ParityRecord, Probe, TopLogits
from core.data.tokenizer import Tokenizer
from core.eval.probes import Known, Said, base_distance, batches, measure
from core.eval.rows import Row
from core.models.adapt import load_adapter
from core.models.load import load_base
from core.models.traces import Touched, Trace, touched_modules

PROBES = 16
PROBE_TOKENS = 128
_CONTEXT = 64
_TOP = 8


def probe_sequences(rows: Sequence[Row]) -> list[Known]:
    """The first rows, cut to 128 tokens of which at most 64 stand before the first trained one."""
    probes = []
    for ids, mask in rows[:PROBES]:
        first = 1 + int(np.argmax(mask[1:] != 0))
        begin = max(0, first - _CONTEXT)
        probes.append((ids[begin : begin + PROBE_TOKENS].tolist(), first - begin))
    return probes


def measure_lora(
    model: PeftModel, folder: Path, sequences: Sequence[Known], base: BaseIdentity, tokenizer: Tokenizer, template: str
) -> ParityRecord:
    """The adapter as read back from `folder` onto the base it was trained on, against that base alone.

    `template` is the chat template's digest. Leaves the adapter as read active, and the model in eval mode. Raises
    ArtifactError where the folder doesn't fit the base tensor by tensor.
    """
    load_adapter(model, folder, "saved")
    return measure_loaded(model, "saved", sequences, base, tokenizer, template)


def measure_loaded(
    model: PeftModel, adapter: str, sequences: Sequence[Known], base: BaseIdentity, tokenizer: Tokenizer, template: str
) -> ParityRecord:
    """An adapter in memory against its base. Leaves it active, and the model in eval mode."""
    model.set_adapter(adapter)
    model.eval()
    trained, traces = _measure(model, sequences, adapter)
    with model.disable_adapter():
        bare, _ = _measure(model, sequences, None)
    modules = _modules(touched_modules(model, adapter), traces)
    return _record(sequences, trained, dict(enumerate(bare)), modules, base, model.device, tokenizer, template)


def measure_full(
    model: Any, model_folder: Path, sequences: Sequence[Known], base: BaseIdentity, tokenizer: Tokenizer, template: str
) -> ParityRecord:
    """The trained model, already in the dtype it was written in, against a fresh load of the base. Leaves it in eval mode.

    The base has no say where a sequence holds new tokens that it has no rows for.
    """
    model.eval()
    trained, _ = _measure(model, sequences, None)
    fresh = load_base(
        model_folder,
        name=base.model,
        weights=base.weights,
        quantization="none",
        precision=base.compute_dtype,
        device=model.device,
    )
    known = [number for number, (ids, _) in enumerate(sequences) if max(ids) < fresh.model.config.vocab_size]
    bare, _ = _measure(fresh.model, [sequences[number] for number in known], None)
    return _record(sequences, trained, dict(zip(known, bare, strict=True)), [], base, model.device, tokenizer, template)


def _measure(model: Any, sequences: Sequence[Known], adapter: str | None) -> tuple[list[Said], dict[str, Trace]]:
    said: list[Said] = []
    traces: dict[str, Trace] = {}
    for number, batch in enumerate(batches(sequences)):
        now, seen = measure(model, batch, adapter if number == 0 else None)
        said += now
        traces |= seen
    return said, traces


def _modules(touched: Sequence[Touched], traces: dict[str, Trace]) -> list[ModuleTrace]:
    by_path = {module.path: module for module in touched}
    reached = [*traces, *(path for path in by_path if path not in traces)]
    modules = []
    for path in reached:
        module, trace = by_path[path], traces.get(path)
        modules.append(
            ModuleTrace(
                path=path,
                kind=module.kind,
                inert=module.is_inert(),
                rms=trace.rms if trace else 0.0,
                output_rms=trace.output_rms if trace else 0.0,
                sample=trace.sample if trace else [],
            )
        )
    return modules


def _record(
    sequences: Sequence[Known],
    trained: Sequence[Said],
    bare: Mapping[int, Said],
    modules: list[ModuleTrace],
    base: BaseIdentity,
    device: torch.device,
    tokenizer: Tokenizer,
    template: str,
) -> ParityRecord:
    probes = []
    for number, ((ids, start), said) in enumerate(zip(sequences, trained, strict=True)):
        logits, top_ids = said.last.topk(min(_TOP, said.last.shape[-1]), dim=-1)
        first = len(ids) - len(said.last)
        base_said = bare.get(number)
        probes.append(
            Probe(
                token_ids=ids,
                start=start,
                text=_text(ids, tokenizer),
                logprobs=said.logprobs,
                base_logprobs=base_said.logprobs if base_said is not None else [],
                top=[
                    TopLogits(position=first + row, ids=top_ids[row].tolist(), logits=logits[row].tolist())
                    for row in range(len(said.last))
                ],
                base_distance=base_distance(said, base_said, top_ids.tolist()) if base_said is not None else None,
            )
        )
    return ParityRecord(
        device=device.type, compute_dtype=base.compute_dtype, base=base, template=template, modules=modules, probes=probes
    )


def _text(ids: list[int], tokenizer: Tokenizer) -> str | None:
    # A cut may go through a character, and not every tokenizer writes back what it read.
    text = tokenizer.decode(ids, skip_special=False)
    return text if tokenizer.encode(text, parse_special=True)[0] == ids else None
