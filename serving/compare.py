"""Answers compared: what a version says here to the probes of its parity record, against what it said when it was trained."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from core.adapter import ParityRecord, ParityRecordV1, Probe, tolerance
from core.eval.probes import Said, base_distance, relative_distance
from serving.limits import Allowed, Refused, finite, unusable
from store.deployments import Check

EFFECT_SHARE = 0.25
"""An adapter must move the base's log-probabilities by at least this share of what it moved them in training."""

_DISTANCE_SHARE = 0.1

Record = ParityRecordV1 | ParityRecord


def same_base(record: ParityRecord, bare: Mapping[int, Said]) -> None:
    """Raise Refused unless the base alone says what it said in training. `bare` holds the probes that it can be asked."""
    apart = _all_apart([(said.logprobs, record.probes[number].base_logprobs) for number, said in bare.items()])
    limit = tolerance(record.compute_dtype)
    if apart and not fmean(apart) <= limit:
        reason = f"the base alone differs from itself in training by {fmean(apart):.2g} nats; {limit:g} are allowed"
        raise Refused("parity", finite({"base_mean_abs_difference": fmean(apart), "tolerance": limit, "reason": reason}))


def same_answers(record: Record, compute_dtype: str, here: Sequence[Said], bare: Mapping[int, Said], limits: Allowed) -> Check:
    """The check `parity`: log-probabilities by their mean, and in version 2 each of the largest logits. Raises Refused."""
    by_probe = [_apart(said.logprobs, probe.logprobs) for said, probe in zip(here, record.probes, strict=True)]
    apart = [difference for probe in by_probe for difference in probe]
    limit = tolerance(compute_dtype)
    numbers: dict[str, Any] = {
        "mean_abs_difference": fmean(apart),
        "max_abs_difference": max(apart),
        "tolerance": limit,
        "probes": len(record.probes),
        "tokens": len(apart),
    }
    if bare:
        base_apart = _all_apart([(said.logprobs, record.probes[number].base_logprobs) for number, said in bare.items()])
        numbers["base_mean_abs_difference"] = fmean(base_apart)
    if not fmean(apart) <= limit:
        number = max(range(len(by_probe)), key=lambda n: max(by_probe[n]))
        probe = record.probes[number]
        token = probe.start + by_probe[number].index(max(by_probe[number]))
        reason = (
            f"log-probabilities differ from those of training by {fmean(apart):.2g} nats; {limit:g} are allowed"
            f" (most in probe {number}, token {token}, id {probe.token_ids[token]})"
        )
        raise Refused("parity", finite({**numbers, "probe": number, "token": token, "reason": reason}))
    if isinstance(record, ParityRecord):
        largest = max(_same_top(number, probe, here[number], limits) for number, probe in enumerate(record.probes))
        kind = "max_logit_difference" if limits.is_absolute else "max_relative_logit_difference"
        numbers |= {kind: largest, "logit_tolerance": limits.logits}
    return Check("parity", True, finite(numbers))


def same_effect(record: Record, here: Sequence[Said], bare: Mapping[int, Said], limits: Allowed) -> Check:
    """The check `effect`: what sets it apart from its base is there, and in version 2 as far as it was. Raises Refused."""
    then = _all_apart([(record.probes[number].logprobs, record.probes[number].base_logprobs) for number in bare])
    now = _all_apart([(here[number].logprobs, said.logprobs) for number, said in bare.items()])
    numbers = finite({"effect": fmean(now), "effect_in_training": fmean(then)})
    if not fmean(now) >= EFFECT_SHARE * fmean(then):
        raise Refused("effect", {**numbers, "reason": "it changes nothing, or far less than in training"})
    if isinstance(record, ParityRecord):
        for number, said in bare.items():
            _same_distance(number, record.probes[number], here[number], said, limits)
    return Check("effect", True, numbers)


def _same_distance(number: int, probe: Probe, here: Said, bare: Said, limits: Allowed) -> None:
    then = probe.base_distance
    now = base_distance(here, bare, [top.ids for top in probe.top])
    if then is None:
        raise unusable(f"probe {number} holds no distance to the base")
    if not abs(now - then) <= _DISTANCE_SHARE * then + limits.distance:
        reason = f"probe {number}: its distance to the base is {now:.3g} here, and {then:.3g} in training"
        raise Refused("effect", finite({"probe": number, "distance": now, "in_training": then, "reason": reason}))


def _same_top(number: int, probe: Probe, said: Said, limits: Allowed) -> float:
    """The largest difference of a logit, or, where shares are allowed, |here - then| / |then| over the probe."""
    first = len(probe.token_ids) - len(said.last)
    if [top.position for top in probe.top] != list(range(first, len(probe.token_ids))):
        raise unusable(f"probe {number} holds no logits of its last {len(said.last)} tokens")
    largest = 0.0
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for top, all_logits in zip(probe.top, said.last.cpu(), strict=True):
        if len(top.ids) != len(top.logits) or not all(0 <= i < len(all_logits) for i in top.ids):
            raise unusable(f"probe {number} holds logits of ids that are not there")
        now, then = all_logits[top.ids], torch.tensor(top.logits)
        apart = (now - then).abs().nan_to_num(torch.inf)
        worst = int(apart.argmax())
        largest = max(largest, float(apart[worst]))
        limit = limits.logits if limits.is_absolute else limits.logits * float(then.square().mean().sqrt())
        place = f"probe {number}, after token {top.position} (id {probe.token_ids[top.position]})"
        numbers = {"probe": number, "token": top.position, "logit_difference": float(apart[worst]), "logit_tolerance": limit}
        if limits.is_absolute and largest > limit:
            reason = f"{place}: the logit of id {top.ids[worst]} is {now[worst]:.6g} here, and {then[worst]:.6g} in training"
            raise Refused("parity", finite({**numbers, "reason": reason}))
        here_first = int(all_logits.argmax())
        if float(then[0] - then[1]) > limit and here_first != top.ids[0]:
            reason = f"{place}: id {here_first} comes first here, and {top.ids[0]} in training"
            raise Refused("parity", finite({**numbers, "reason": reason}))
        pairs.append((now, then))
    if limits.is_absolute:
        return largest
    share = relative_distance(torch.cat([now for now, _ in pairs]), torch.cat([then for _, then in pairs]))
    if not share <= limits.logits:
        reason = (
            f"probe {number}: the logits after its last tokens differ by {share:.2g} of their size; {limits.logits:g} is allowed"
        )
        raise Refused("parity", finite({"probe": number, "logit_difference": share, "reason": reason}))
    return share


def _apart(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def _all_apart(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    return [difference for a, b in pairs for difference in _apart(a, b)]
