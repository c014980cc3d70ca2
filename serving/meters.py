"""Numbers for Prometheus: what each model that is served was asked and how fast it answered.

A label is a base or a deployed adapter's version, never what a client wrote; those of versions that are served no longer go
at the next scrape. Times are those of this process's readers, so they hold the queue, the engine and the event loop.
"""

import time
from collections import Counter as Tally
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from core.infer.progress import End
from core.infer.ticket import Failed, Item

ModelLabel = tuple[str, str]
"""(project id, or "" for a base; name as the answer's `model` has it)."""

_LABELS = ("project", "model")
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Residency(Protocol):
    """An adapter that is copied to a GPU when it is asked, from host memory or, where it had to leave that, from its files."""

    is_resident: bool
    loads: int
    evictions: int
    host_loads: int
    host_evictions: int


class Meters:
    """Of one application; its own registry, so several may live in one process. For the event loop's thread alone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "strop_serving_requests", "Choices asked for, by how they ended.", (*_LABELS, "outcome"), registry=registry
        )
        self.prompt_tokens = Counter("strop_serving_prompt_tokens", "Prompt tokens taken in.", _LABELS, registry=registry)
        self.cached_tokens = Counter(
            "strop_serving_cached_prompt_tokens", "Of them, found in memory from an earlier request.", _LABELS, registry=registry
        )
        self.generated_tokens = Counter("strop_serving_generated_tokens", "Tokens generated.", _LABELS, registry=registry)
        self.first_seconds = Histogram(
            "strop_serving_first_token_seconds", "Submission to first token.", _LABELS, buckets=_FIRST, registry=registry
        )
        self.between_seconds = Histogram(
            "strop_serving_inter_token_seconds", "From token to token.", _LABELS, buckets=_BETWEEN, registry=registry
        )
        self._waiting_gauge = Gauge("strop_serving_waiting", "Choices without a first token yet.", _LABELS, registry=registry)
        self._running_gauge = Gauge("strop_serving_running", "Choices being generated.", _LABELS, registry=registry)
        self._adapter_gauges = {
            what: Gauge(f"strop_serving_adapter_{name}", said, _LABELS, registry=registry)
            for what, name, said in (
                ("is_resident", "resident", "1 where the adapter lies on the GPU now."),
                ("loads", "loads", "Times it was copied to the GPU since it was deployed."),
                ("evictions", "evictions", "Times it had to leave the GPU for another."),
                ("host_loads", "host_loads", "Times it was read from its files since it was deployed."),
                ("host_evictions", "host_evictions", "Times it had to leave host memory for another."),
            )
        }
        self.waiting: Tally[ModelLabel] = Tally()
        self.running: Tally[ModelLabel] = Tally()
        self._outcomes: set[tuple[str, str, str]] = set()

    def ended(self, label: ModelLabel, outcome: str) -> None:
        """One choice is over: stop, length, failed, cancelled, or queue_full where it was never begun."""
        self._outcomes.add((*label, outcome))
        self.requests.labels(*label, outcome).inc()

    def adapters(self, staged: Iterable[tuple[ModelLabel, Residency]]) -> None:
        """What is known of the adapters that are served now and live in slots of a GPU; of others nothing is told."""
        for gauge in self._adapter_gauges.values():
            gauge.clear()
        for label, one in staged:
            for what, gauge in self._adapter_gauges.items():
                gauge.labels(*label).set(getattr(one, what))

    def render(self, served: Iterable[ModelLabel]) -> bytes:
        """The exposition text; what is not of `served` and has nothing under way is forgotten."""
        busy = {label for tally in (self.waiting, self.running) for label, count in tally.items() if count}
        kept = {*served, *busy}
        for outcome in [one for one in self._outcomes if one[:2] not in kept]:
            self._outcomes.remove(outcome)
            self.requests.remove(*outcome)
        for label in [label for label in self.waiting if label not in kept]:
            for counter in (self.prompt_tokens, self.cached_tokens, self.generated_tokens):
                counter.remove(*label)
            for histogram in (self.first_seconds, self.between_seconds):
                histogram.remove(*label)
            for gauge, tally in ((self._waiting_gauge, self.waiting), (self._running_gauge, self.running)):
                gauge.remove(*label)
                del tally[label]
        for gauge, tally in ((self._waiting_gauge, self.waiting), (self._running_gauge, self.running)):
            for label in self.waiting:
                gauge.labels(*label).set(tally[label])
        return generate_latest(self.registry)


class Watch:
    """Follows one choice from its submission to its end."""

    def __init__(self, meters: Meters, label: ModelLabel) -> None:
        self._meters = meters
        self._label = label
        self._stands_in: Tally[ModelLabel] | None = meters.waiting
        self._last = time.perf_counter()
        self._first = meters.first_seconds.labels(*label)
        self._between = meters.between_seconds.labels(*label)
        self._tokens = meters.generated_tokens.labels(*label)
        meters.waiting[label] += 1
        meters.running[label] += 0

    def saw(self, item: Item) -> None:
        if isinstance(item, End | Failed):
            self.ended(item.reason if isinstance(item, End) else "failed")
            return
        now = time.perf_counter()
        (self._first if self._stands_in is self._meters.waiting else self._between).observe(now - self._last)
        self._last = now
        self._tokens.inc()
        self._move(self._meters.running)

    def ended(self, outcome: str) -> None:
        """Once; what is said after that is not heard."""
        if self._stands_in is not None:
            self._move(None)
            self._meters.ended(self._label, outcome)

    def _move(self, tally: Tally[ModelLabel] | None) -> None:
        if tally is not self._stands_in:
            if self._stands_in is not None:
                self._stands_in[self._label] -= 1
            if tally is not None:
                tally[self._label] += 1
            self._stands_in = tally
