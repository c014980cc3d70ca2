"""May this version be served here? Every check with its numbers, before the first request sees it.

The order is from cheap to dear: files against the manifest, the base it belongs to, every tensor in its place, the chat
template, then the proof, in `parity.py`: what the training process measured is reproduced. The first check that fails is the
last one made, and what was loaded is taken out again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from core.adapter import ADAPTER_KIND, PARITY_FILE, AdapterFacts, BaseIdentity, ParityRecord, ParityRecordV1, read_parity
from core.errors import ArtifactError
from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine
from core.infer.servable import Servable
from core.manifest import folder_bytes, folder_digest, verify_folder
from core.models.load import load_base
from serving.limits import Refused
from serving.parity import reproduce
from store.deployments import Check


@dataclass
class Verdict:
    """The checks made, and what may be served if all passed."""

    checks: list[Check] = field(default_factory=list)
    servable: Servable | None = None
    facts: AdapterFacts | None = None
    _since: float = field(default_factory=time.perf_counter)

    def add(self, check: Check) -> None:
        """The next check, with the seconds since the one before."""
        now = time.perf_counter()
        self.checks.append(replace(check, numbers={**check.numbers, "seconds": round(now - self._since, 4)}))
        self._since = now

    @property
    def reason(self) -> str:
        """Why not, in one sentence."""
        failed = [check for check in self.checks if not check.passed]
        return "; ".join(f"{check.name}: {check.numbers.get('reason', check.numbers)}" for check in failed)


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
        servable = _load(folder, sha256, adapter, facts, base, engine, device, verdict)
        try:
            _template(facts, servable, verdict)
            reproduce(facts, record, servable, base, engine, verdict.add)
        except BaseException:
            engine.call(lambda: release(servable))
            raise
        verdict.servable = servable
    except Refused as refused:
        verdict.add(refused.check)
    return verdict


def release(servable: Servable) -> None:
    """Take a version out of memory. A full model goes with the last reference to it."""
    if servable.adapter is not None:
        servable.host.unload(servable.adapter)
    if servable.weights is not None and servable.host.runner is not None:
        servable.host.runner.sites.forget(servable.weights)


def _manifest(folder: Path, sha256: str, verdict: Verdict) -> AdapterFacts:
    try:
        facts = AdapterFacts.model_validate(verify_folder(folder, ADAPTER_KIND))
        if folder_digest(folder) != sha256:
            raise ArtifactError(f"the folder's digest is {folder_digest(folder)}, and the record says {sha256}")
    except (ArtifactError, ValidationError) as error:
        raise Refused("manifest", {"reason": str(error)}) from None
    verdict.add(Check("manifest", True, {"bytes": folder_bytes(folder)}))
    return facts


def _base(facts: AdapterFacts, bases: Sequence[AdaptedBase], verdict: Verdict) -> AdaptedBase:
    served = [base.identity for base in bases]
    numbers = {"trained_on": _shown(facts.base), "served": [_shown(identity) for identity in served]}
    for base in bases:
        if facts.base.matches(base.identity):
            verdict.add(Check("base_identity", True, numbers))
            return base
    here = ", ".join(map(str, served)) or "no base"
    raise Refused("base_identity", {**numbers, "reason": f"trained on {facts.base}; this endpoint serves {here}"})


def _record(folder: Path) -> ParityRecordV1 | ParityRecord:
    try:
        return read_parity((folder / PARITY_FILE).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise Refused("parity", {"reason": f"{PARITY_FILE} can't be read: {error}"}) from None


def _load(
    folder: Path,
    sha256: str,
    adapter: str,
    facts: AdapterFacts,
    base: AdaptedBase,
    engine: Engine,
    device: torch.device,
    verdict: Verdict,
) -> Servable:
    try:
        if facts.tuning == "full":
            servable = _load_full(folder, facts, base, device)
        else:
            servable = _load_adapter(folder, sha256, adapter, base, engine)
    except torch.OutOfMemoryError as error:
        raise Refused("load", {"reason": f"out of memory: {error}"}) from None
    except (ArtifactError, OSError, RuntimeError, ValueError) as error:
        raise Refused("load", {"reason": str(error)}) from None
    verdict.add(Check("load", True, {"tuning": facts.tuning, "rank": facts.rank}))
    return servable


def _load_adapter(folder: Path, sha256: str, adapter: str, base: AdaptedBase, engine: Engine) -> Servable:
    """For packed steps where they can express it, else by peft. Reading costs running answers nothing."""
    weights = base.runner.sites.read(folder, sha256) if base.runner is not None else None
    if base.runner is not None and weights is not None:
        sites = base.runner.sites
        try:
            engine.call(lambda: sites.install(weights))
            return Servable(base, folder, weights=weights)
        except BaseException:
            engine.call(lambda: sites.forget(weights))
            raise
    engine.call(lambda: base.load(folder, adapter))
    try:
        return Servable(base, folder, adapter=adapter)
    except BaseException:
        engine.call(lambda: base.unload(adapter))
        raise


def _load_full(folder: Path, facts: AdapterFacts, base: AdaptedBase, device: torch.device) -> Servable:
    loaded = load_base(
        folder,
        name=facts.base.model,
        weights=facts.base.weights,
        quantization="none",
        precision=facts.base.compute_dtype,
        device=device,
    )
    return Servable(AdaptedBase(loaded, kv_gib=base.kv_gib, adapter_gib=0), folder)


def _template(facts: AdapterFacts, servable: Servable, verdict: Verdict) -> None:
    numbers = {"trained_with": facts.template, "served_with": servable.template.digest}
    if facts.template != servable.template.digest:
        raise Refused("template", {**numbers, "reason": "it would be asked in another chat template than it was trained with"})
    verdict.add(Check("template", True, numbers))


def _shown(identity: BaseIdentity) -> dict[str, str]:
    return identity.model_dump()
