"""The parity record reproduced: does what was loaded here compute what was trained?

The base is asked first, so that its own faults are not laid on the adapter; then the adapter, module by module in the order
that a token meets them, so that a fault is named where it stands; then its answers are compared (`compare.py`). `_Measured`
is the one place that runs a model.

Each module is held to what it added in training, instead of being zeroed alone to see whether the answers change: one pass
serves all of them, a wrong scale or an exchange is seen as well as an absence, and the module is named. That its part then
arrives in the answers is what the logits show.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch

from core.adapter import AdapterFacts, ModuleTrace, ParityProbe, ParityRecord, ParityRecordV1
from core.eval.probes import Known, Said, batches, measure, said_of
from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine
from core.infer.lora import LoraWeights
from core.infer.servable import Servable
from core.models.traces import Trace, touched_modules
from serving.compare import same_answers, same_base, same_effect
from serving.limits import UNMEASURABLE, Allowed, Refused, allowed, finite, unusable
from store.deployments import Check


def reproduce(
    facts: AdapterFacts,
    record: ParityRecordV1 | ParityRecord,
    servable: Servable,
    base: AdaptedBase,
    engine: Engine,
    add: Callable[[Check], None],
) -> None:
    """`add` the checks that pass; raise Refused for the one that doesn't. Model work runs on the engine's thread."""
    vocabulary, base_vocabulary = (host.model.config.vocab_size for host in (servable.host, base))
    for probe in record.probes:
        # On a GPU an index out of range would take the whole process's context down, not just this check.
        if not all(0 <= token < vocabulary for token in probe.token_ids):
            raise unusable(f"a probe holds ids outside the vocabulary of {vocabulary}")
    limits = allowed(facts.base, record.device, servable.host.model.device.type)
    if isinstance(record, ParityRecord):
        add(_same_ids(facts, record, servable))
    # Of tokens that are new in a full model its base knows nothing.
    known = [number for number, probe in enumerate(record.probes) if max(probe.token_ids) < base_vocabulary]
    bare = dict(zip(known, _run(engine, _Measured(base), [record.probes[number] for number in known]), strict=True))
    for number, probe in enumerate(record.probes):
        expected = (len(probe.token_ids) - probe.start, len(probe.token_ids) - probe.start if number in bare else 0)
        if (len(probe.logprobs), len(probe.base_logprobs)) != expected:
            counts = f"{len(probe.logprobs)} and {len(probe.base_logprobs)} log-probabilities"
            raise unusable(f"probe {number} holds {counts}, and {expected[0]} and {expected[1]} are found here")

    def of_modules(traces: dict[str, Trace]) -> None:
        if isinstance(record, ParityRecord):
            add(_same_modules(record, servable, traces, limits))

    if isinstance(record, ParityRecord):
        same_base(record, bare)
    here = _run(engine, _Measured(servable.host, servable.weights, servable.adapter), record.probes, of_modules)
    add(same_answers(record, facts.base.compute_dtype, here, bare, limits))
    if bare:
        add(same_effect(record, here, bare, limits))


@dataclass(frozen=True)
class _Measured:
    """A base, alone or with an adapter: what is asked."""

    host: AdaptedBase
    weights: LoraWeights | None = None
    adapter: str | None = None

    def measure(self, batch: Sequence[Known], *, is_traced: bool) -> tuple[list[Said], dict[str, Trace]]:
        """By the path that answers requests."""
        runner = self.host.runner
        if runner is not None and self.adapter is None:
            # Reading what each module adds is dearer than running it: of the traced batch only.
            tracing: AbstractContextManager[dict[str, Trace]] = runner.sites.tracing() if is_traced else nullcontext({})
            with tracing as traces:
                logits = runner.score([ids for ids, _ in batch], self.weights)
            return [said_of(rows, ids, start) for rows, (ids, start) in zip(logits, batch, strict=True)], traces
        self.host.activate(self.adapter)
        return measure(self.host.model, batch, self.adapter if is_traced else None)


def _run(
    engine: Engine,
    asked: _Measured,
    probes: Sequence[ParityProbe],
    of_first: Callable[[dict[str, Trace]], None] = lambda traces: None,
) -> list[Said]:
    """Every batch is a call of its own, so that running answers go on in between. `of_first` judges the first one's traces."""
    said: list[Said] = []
    for number, batch in enumerate(batches([(probe.token_ids, probe.start) for probe in probes])):
        try:
            now, traces = engine.call(lambda b=batch, t=number == 0: asked.measure(b, is_traced=t))  # type: ignore[misc]
        except (IndexError, RuntimeError, ValueError) as error:
            raise unusable(f"a probe can't be run: {error}") from None
        if number == 0:
            of_first(traces)
        said += now
    return said


def _same_ids(facts: AdapterFacts, record: ParityRecord, servable: Servable) -> Check:
    if record.template != facts.template or not record.base.matches(facts.base):
        raise unusable(
            f"it was measured on {record.base} with the template {record.template[:12]}; "
            f"the manifest says {facts.base} and {facts.template[:12]}"
        )
    texts = {number: probe.text for number, probe in enumerate(record.probes) if probe.text is not None}
    for number, text in texts.items():
        ids, _ = servable.tokenizer.encode(text, parse_special=True)
        for place, (now, then) in enumerate(zip_longest(ids, record.probes[number].token_ids)):
            if now != then:
                reason = f"probe {number}, token {place}: its text gives the id {now} here, and {then} in training"
                raise Refused("token_ids", {"probe": number, "token": place, "reason": reason})
    return Check("token_ids", True, {"probes": len(record.probes), "with_text": len(texts)})


def _same_modules(record: ParityRecord, servable: Servable, traces: dict[str, Trace], limits: Allowed) -> Check:
    touched: dict[str, Literal["lora", "dora", "whole"]] = {}
    if servable.weights is not None:
        touched = dict(servable.weights.kinds)
    elif servable.adapter is not None:
        touched = {module.path: module.kind for module in touched_modules(servable.host.model, servable.adapter)}
    recorded = {module.path: module.kind for module in record.modules}
    for path, kind in recorded.items():
        if path not in touched:
            raise _module(path, "was trained, and nothing is there for it here")
        if touched[path] != kind:
            raise _module(path, f"was trained as {kind}, and is {touched[path]} here")
    for path in touched:
        if path not in recorded:
            raise _module(path, "is changed by the adapter here, and was not in training")
    apart = [_same_trace(module, traces.get(module.path), limits) for module in record.modules]
    numbers = {
        "modules": len(recorded),
        "inert": sum(module.inert for module in record.modules),
        "unreached": sum(module.output_rms == 0 for module in record.modules),
        "max_relative_difference": max(apart, default=0.0),
        "tolerance": limits.module,
    }
    return Check("modules", True, numbers)


def _same_trace(then: ModuleTrace, trace: Trace | None, limits: Allowed) -> float:
    """The difference in size, as a share of the recorded one."""
    now = trace.rms if trace is not None else 0.0
    unmeasurable = UNMEASURABLE * then.output_rms
    numbers = {"adds": now, "added_in_training": then.rms, "tolerance": limits.module}
    if now == 0 and then.rms > unmeasurable:
        raise _module(then.path, "adds nothing here, and was not inert in training", **numbers)
    if not abs(now - then.rms) <= limits.module * then.rms + unmeasurable:
        sizes = f"adds {now:.4g} to its output (root mean square), and {then.rms:.4g} in training"
        raise _module(then.path, sizes, **numbers)
    sample, expected = torch.tensor(trace.sample if trace is not None else []), torch.tensor(then.sample)
    if sample.shape != expected.shape:
        raise unusable(f"{then.path} has {len(expected)} samples of what it adds, and {len(sample)} are found here")
    if not float((sample - expected).norm()) <= limits.sample * float(expected.norm()) + unmeasurable * len(expected) ** 0.5:
        raise _module(then.path, "adds as much as in training, but not the same: are these another module's weights?", **numbers)
    return abs(now - then.rms) / then.rms if then.rms > unmeasurable else 0.0


def _module(path: str, reason: str, **numbers: float) -> Refused:
    return Refused("modules", finite({"module": path, **numbers, "reason": f"{path} {reason}"}))
