"""Numbers for Prometheus: requests counted in this process, and the state of the work as the record has it.

The gauges are asked from Postgres at each scrape, so every control plane process gives the same ones. Not per project: the
scope `metrics:read` is for the operator's collector.
"""

import re

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.states import JobStatus
from store import nodes
from store.tables import Job, Outbox

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
_METHOD = re.compile(r"GET|POST|DELETE|PUT|PATCH|HEAD|OPTIONS")


class Meters:
    """Of one application; its own registry, so several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("strop_http_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "strop_http_request_seconds",
            "Time to the end of the answer; of a live stream its whole life.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self.registry,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route` is the path's template: a label per path would grow without end, and so would one per made-up method."""
        method = method if _METHOD.fullmatch(method) else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def render(self, session: Session) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry) + generate_latest(_state(session))


def _state(session: Session) -> CollectorRegistry:
    registry = CollectorRegistry()
    jobs = Gauge("strop_jobs", "Jobs by status.", ["status"], registry=registry)
    counts: dict[str, int] = {}
    for status, count in session.execute(select(Job.status, func.count()).group_by(Job.status)):
        counts[status] = count
    for known in JobStatus:
        jobs.labels(known).set(counts.get(known, 0))
    bells = Gauge("strop_bells", "Work posted and not yet taken, by queue.", ["queue"], registry=registry)
    for queue, count in session.execute(select(Outbox.queue, func.count()).group_by(Outbox.queue)):
        bells.labels(queue).set(count)
    oldest = select(func.extract("epoch", func.now() - func.min(Job.created_at))).where(Job.status == JobStatus.QUEUED)
    age = Gauge("strop_oldest_queued_job_seconds", "Age of the oldest queued job; 0 when none waits.", registry=registry)
    age.set(float(session.scalar(oldest) or 0))
    workers = Gauge("strop_workers", "Live workers by queue.", ["queue"], registry=registry)
    seen = [queue for node in nodes.live_nodes(session) for queue in node.queues]
    for queue in ("gpu", "prepare"):
        workers.labels(queue).set(seen.count(queue))
    return registry
