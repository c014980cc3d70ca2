"""Vocabulary and catalogues are in step, so that a half-added reason, format or family fails here at once."""

import subprocess
import sys

import pytest

from core import states
from core.events import METRICS, TrainEvent, parse_event
from core.records import DatasetReport
from tests.conftest import ROOT


def test_every_reason_has_its_facts_and_exit_codes_are_distinct() -> None:
    assert set(states.REASONS) == set(states.Reason)
    codes = [facts.exit_code for facts in states.REASONS.values() if facts.exit_code is not None]
    assert len(codes) == len(set(codes)) == len(states.EXIT_REASONS)


def test_a_run_that_may_be_retried_does_not_end_its_job_as_a_success() -> None:
    for reason in states.Reason:
        if reason.facts.retry is not states.Retry.NEVER:
            assert reason.facts.job is not states.JobStatus.SUCCEEDED


def test_every_transition_leads_out_of_what_has_not_ended() -> None:
    assert set(states.JOB_TRANSITIONS) == set(states.JobStatus)
    for status, targets in states.JOB_TRANSITIONS.items():
        assert (not targets) == status.is_terminal


def test_curves_are_fields_of_their_events() -> None:
    for kind, names in METRICS.items():
        members = {member.model_fields["kind"].default: member for member in TrainEvent.__args__[0].__args__}
        assert set(names) <= set(members[kind].model_fields)


def test_an_event_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind"):
        parse_event({"kind": "rumour", "seq": 1})


def test_formats_of_the_report_are_the_formats_on_offer() -> None:
    from core.data.formats import FORMATS

    described = DatasetReport.model_fields["format"].description or ""
    for name in FORMATS:
        assert name in described


@pytest.mark.parametrize(
    "module",
    ["api.app", "worker.app", "worker.tasks", "store.admin", "standalone.stack", "core.prepare", "core.data.render"],
)
def test_torch_stays_behind_its_door(module: str) -> None:
    """Static contracts don't see an import inside a function that runs at import time; a fresh interpreter does."""
    program = f"import sys, {module}; sys.exit(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)) or 0)"
    environment = {"DATABASE_URL": "postgresql://nowhere/none", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
