"""May this version be served here? Every check with its numbers, before the first request sees it.

The order is from cheap to dear: files against the manifest, the base it belongs to, the chat template, every tensor in its
place, then the proof: the log-probabilities that the training process measured are reproduced, and an adapter changes what
the base says. The first check that fails is the last one made, and what was loaded is taken out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import ValidationError

from core.adapter import ADAPTER_KIND, PARITY_FILE, AdapterFacts, BaseIdentity, ParityRecord, tolerance
from core.errors import ArtifactError, StropError
from core.eval.logprobs import sequence_logprobs
from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine, Servable
from core.manifest import folder_bytes, folder_digest, verify_folder
from core.models.load import load_base
from store.deployments import Check

EFFECT_SHARE = 0.25
"""An adapter must move the base's log-probabilities by at least this share of what it moved them in training."""


@dataclass
class Verdict:
    """The checks made, and what may be served if all passed. `unload` frees its memory, on the engine's thread."""

    checks: list[Check] = field(default_factory=list)
    servable: Servable | None = None
    facts: AdapterFacts | None = None

    @property
    def reason(self) -> str:
        """Why not, in one sentence."""
        failed = [check for check in self.checks if not check.passed]
        return "; ".join(f"{check.name}: {check.numbers.get('reason', check.numbers)}" for check in failed)


class _Refused(StropError):
    """Carries the failed check."""

    def __init__(self, check: str, numbers: dict[str, Any]) -> None:
        super().__init__(check)
        self.check = Check(check, False, numbers)


def bring_up(
    folder: Path, sha256: str, adapter: str, bases: Sequence[AdaptedBase], engine: Engine, device: torch.device
) -> Verdict:
    """Load a result onto the base it was trained on and check it.

    `sha256` is the folder digest in the record, `adapter` the name the result gets in memory.

    Model work runs on the engine's thread, between tokens of running answers.
    """
    verdict = Verdict()
    try:
        facts = _manifest(folder, sha256, verdict)
        verdict.facts = facts
        base = _base(facts, bases, verdict)
        record = _record(folder)
        servable = _load(folder, adapter, facts, base, engine, device, verdict)
        try:
            _template(facts, servable, verdict)
            _parity(facts, record, servable, base, engine, verdict)
        except BaseException:
            engine.call(lambda: release(servable))
            raise
        verdict.servable = servable
    except _Refused as refused:
        verdict.checks.append(refused.check)
    return verdict


def release(servable: Servable) -> None:
    """Take a version out of memory. A full model goes with the last reference to it."""
    if servable.adapter is not None:
        servable.host.unload(servable.adapter)


def _manifest(folder: Path, sha256: str, verdict: Verdict) -> AdapterFacts:
    try:
        facts = AdapterFacts.model_validate(verify_folder(folder, ADAPTER_KIND))
        if folder_digest(folder) != sha256:
            raise ArtifactError(f"the folder's digest is {folder_digest(folder)}, and the record says {sha256}")
    except (ArtifactError, ValidationError) as error:
        raise _Refused("manifest", {"reason": str(error)}) from None
    verdict.checks.append(Check("manifest", True, {"bytes": folder_bytes(folder)}))
    return facts


def _base(facts: AdapterFacts, bases: Sequence[AdaptedBase], verdict: Verdict) -> AdaptedBase:
    served = [base.identity for base in bases]
    numbers = {"trained_on": _shown(facts.base), "served": [_shown(identity) for identity in served]}
    for base in bases:
        if facts.base.matches(base.identity):
            verdict.checks.append(Check("base_identity", True, numbers))
            return base
    here = ", ".join(map(str, served)) or "no base"
    raise _Refused("base_identity", {**numbers, "reason": f"trained on {facts.base}; this endpoint serves {here}"})


def _record(folder: Path) -> ParityRecord:
    try:
        return ParityRecord.model_validate_json((folder / PARITY_FILE).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise _Refused("parity", {"reason": f"{PARITY_FILE} can't be read: {error}"}) from None


def _load(
    folder: Path,
    adapter: str,
    facts: AdapterFacts,
    base: AdaptedBase,
    engine: Engine,
    device: torch.device,
    verdict: Verdict,
) -> Servable:
    try:
        if facts.tuning != "full":
            engine.call(lambda: base.load(folder, adapter))
            try:
                servable = Servable(base, adapter, folder)
            except BaseException:
                engine.call(lambda: base.unload(adapter))
                raise
        else:
            loaded = load_base(
                folder,
                name=facts.base.model,
                weights=facts.base.weights,
                quantization="none",
                precision=facts.base.compute_dtype,
                device=device,
            )
            servable = Servable(AdaptedBase(loaded), None, folder)
    except torch.OutOfMemoryError as error:
        raise _Refused("load", {"reason": f"out of memory: {error}"}) from None
    except (ArtifactError, OSError, RuntimeError, ValueError) as error:
        raise _Refused("load", {"reason": str(error)}) from None
    verdict.checks.append(Check("load", True, {"tuning": facts.tuning, "rank": facts.rank}))
    return servable


def _template(facts: AdapterFacts, servable: Servable, verdict: Verdict) -> None:
    numbers = {"trained_with": facts.template, "served_with": servable.template.digest}
    if facts.template != servable.template.digest:
        raise _Refused("template", {**numbers, "reason": "it would be asked in another chat template than it was trained with"})
    verdict.checks.append(Check("template", True, numbers))


def _parity(
    facts: AdapterFacts, record: ParityRecord, servable: Servable, base: AdaptedBase, engine: Engine, verdict: Verdict
) -> None:
    # Absolute differences, a token each: trained against here, and what the base's answers differ by, then and now.
    apart: list[float] = []
    base_apart: list[float] = []
    effect_then: list[float] = []
    effect_now: list[float] = []
    vocabulary, base_vocabulary = (host.model.config.vocab_size for host in (servable.host, base))
    for probe in record.probes:
        # On a GPU an index out of range would take the whole process's context down, not just this check.
        if not all(0 <= token < vocabulary for token in probe.token_ids):
            raise _Refused("parity", {"reason": f"a probe of {PARITY_FILE} holds ids outside the vocabulary of {vocabulary}"})
        try:
            here = engine.call(lambda p=probe: _measure(servable.host, servable.adapter, p.token_ids, p.start))  # type: ignore[misc]
            here_base = []
            if max(probe.token_ids) < base_vocabulary:  # of tokens that are new in a full model its base knows nothing
                here_base = engine.call(lambda p=probe: _measure(base, None, p.token_ids, p.start))  # type: ignore[misc]
        except (IndexError, RuntimeError, ValueError) as error:
            raise _Refused("parity", {"reason": f"a probe of {PARITY_FILE} can't be run: {error}"}) from None
        if (len(here), len(here_base)) != (len(probe.logprobs), len(probe.base_logprobs)):
            counts = f"{len(probe.logprobs)} and {len(probe.base_logprobs)} log-probabilities"
            found = f"{len(here)} and {len(here_base)}"
            raise _Refused("parity", {"reason": f"a probe of {PARITY_FILE} holds {counts}, and {found} are found here"})
        apart += _differences(here, probe.logprobs)
        if here_base:
            base_apart += _differences(here_base, probe.base_logprobs)
            effect_then += _differences(probe.logprobs, probe.base_logprobs)
            effect_now += _differences(here, here_base)
    allowed = tolerance(facts.base.compute_dtype)
    numbers = {
        "mean_abs_difference": fmean(apart),
        "max_abs_difference": max(apart),
        "tolerance": allowed,
        "probes": len(record.probes),
        "tokens": len(apart),
    }
    if base_apart:
        numbers["base_mean_abs_difference"] = fmean(base_apart)
    if not fmean(apart) <= allowed:
        reason = f"log-probabilities differ from those of training by {fmean(apart):.2g} nats; {allowed:g} are allowed"
        raise _Refused("parity", {**_finite(numbers), "reason": reason})
    verdict.checks.append(Check("parity", True, _finite(numbers)))
    if base_apart:
        numbers = {"effect": fmean(effect_now), "effect_in_training": fmean(effect_then)}
        if not numbers["effect"] >= EFFECT_SHARE * numbers["effect_in_training"]:
            raise _Refused("effect", {**_finite(numbers), "reason": "it changes nothing, or far less than in training"})
        verdict.checks.append(Check("effect", True, _finite(numbers)))


def _measure(host: AdaptedBase, adapter: str | None, token_ids: list[int], start: int) -> list[float]:
    host.activate(adapter)
    return sequence_logprobs(host.model, token_ids, start)


def _differences(a: list[float], b: list[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    # JSON, and so the receipt, has no NaN and no infinity.
    return {name: value if abs(value) < float("inf") else str(value) for name, value in numbers.items()}


def _shown(identity: BaseIdentity) -> dict[str, str]:
    return identity.model_dump()
