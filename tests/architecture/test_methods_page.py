"""docs/methods.md is whole: every choice of the spec is on it, and every test it names is there."""

import re

from core.presets import PRESETS
from core.spec import DATA_KINDS, EvalSpec, JobSpec, LoraTuning
from core.states import Reason
from tests.conftest import ROOT
from tests.core.train.test_methods import CASES, TUNINGS

PAGE = (ROOT / "docs" / "methods.md").read_text()


def kinds(part: str) -> set[str]:
    schema = JobSpec.model_json_schema()
    return set(schema["properties"][part]["discriminator"]["mapping"])


def test_every_choice_of_the_spec_is_on_the_page() -> None:
    wanted = kinds("tuning") | kinds("quantization") | kinds("objective") | set(PRESETS)
    wanted |= set(LoraTuning.model_fields) - {"kind", "rank", "alpha", "dropout", "target_modules"}
    wanted |= set(EvalSpec.model_fields) - {"panel_max_tokens"}
    missing = {name for name in wanted if f"`{name}" not in PAGE and f".{name}`" not in PAGE}
    assert missing == set()
    assert kinds("objective") == set(DATA_KINDS)


def test_every_case_it_names_is_tested_and_the_other_way_round() -> None:
    named = set(re.findall(r"\b([a-z0-9-]+)-\*", PAGE))
    assert named == set(TUNINGS)
    ends = set(re.findall(r"\*-([a-z_-]+)", PAGE))
    assert ends == {objective for _, objective in CASES}


def test_its_reasons_exist() -> None:
    table = PAGE.split("| reason | when |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", table))
    assert named
    assert named <= {reason.value for reason in Reason}
