"""Settings that can't be meant are refused at start, and the refusal repeats no secret."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from store.settings import Settings

URL = "http://judge.internal:8001/v1"
JUDGE: dict[str, Any] = {"STROP_JUDGE_URL": URL, "STROP_JUDGE_MODEL": "m"}


def settings(**given: Any) -> Settings:
    return Settings(_env_file=None, **given)


def test_no_judge_is_the_default_and_both_halves_make_one() -> None:
    assert not settings().has_judge
    assert settings(**JUDGE).has_judge
    for url in ("https://api.example.com", "http://[::1]:8001/v1/", "http://10.0.0.7/openai/v1"):
        assert settings(**JUDGE | {"STROP_JUDGE_URL": url}).judge_url == url


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"STROP_JUDGE_URL": URL}, "set both, or neither"),
        ({"STROP_JUDGE_MODEL": "m"}, "set both, or neither"),
        ({"STROP_JUDGE_KEY_FILE": Path("key")}, "set STROP_JUDGE_URL and STROP_JUDGE_MODEL too"),
        (JUDGE | {"STROP_JUDGE_SECONDS": 0}, "STROP_JUDGE_SECONDS"),
        (JUDGE | {"STROP_JUDGE_SECONDS": float("nan")}, "STROP_JUDGE_SECONDS"),
        (JUDGE | {"STROP_JUDGE_SECONDS": float("inf")}, "STROP_JUDGE_SECONDS"),
        *(
            (JUDGE | {"STROP_JUDGE_URL": url}, r"must be http\(s\)://host")
            for url in (
                *("judge:8001/v1", "file:///etc/passwd", "http://", "http:///v1", "http://judge:99999/v1", "http://judge:x/v1"),
                *("http://user:canary@judge/v1", "http://judge/v1?key=canary", "http://judge/v1#canary"),
            )
        ),
    ],
)
def test_half_a_judge_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as refused:
        settings(**given, DATABASE_URL="postgresql+psycopg://strop:canary@host/strop")
    assert "canary" not in str(refused.value)
