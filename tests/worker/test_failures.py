"""The sentence a user reads about a run that failed."""

import pytest

from core.events import Ended
from core.states import Reason
from worker.failures import judge, last_error, tidy


@pytest.mark.parametrize(
    ("line", "short"),
    [
        ("no file /srv/app/data/x.json here", "no file x.json here"),
        ("at '/srv/cache/hub/model': gone", "at 'model': gone"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("a/b and 1/2", "a/b and 1/2"),
        ("nul \0 is gone", "nul \ufffd is gone"),
    ],
)
def test_a_message_names_no_folder(line: str, short: str) -> None:
    assert tidy(line) == short


def test_the_last_exception_speaks_and_not_the_chatter_after_it() -> None:
    output = "Traceback:\n  File x\nValueError: first\ntorch.OutOfMemoryError: second\nbye\n"
    assert last_error(output) == "torch.OutOfMemoryError: second"
    assert last_error("only this\n\n") == "only this"
    assert last_error("") == ""


def test_a_run_that_ended_well_says_how() -> None:
    early = Ended(reason=Reason.FINISHED, message="Training was stopped early, after step 40.", step=40)
    assert judge(0, early, "", asked_to_stop=False) == (Reason.FINISHED, early.message)
    assert judge(0, None, "", asked_to_stop=False) == (Reason.FINISHED, Reason.FINISHED.facts.sentence)


def test_the_exit_code_decides_and_a_contradicting_event_does_not_speak() -> None:
    said = Ended(reason=Reason.FINISHED, message="all well", step=1)
    assert judge(15, said, "", asked_to_stop=False) == (Reason.CUDA_OOM, Reason.CUDA_OOM.facts.sentence)
    assert judge(-9, said, "", asked_to_stop=False) == (
        Reason.INTERNAL_ERROR,
        "The training process was ended by SIGKILL.",
    )
