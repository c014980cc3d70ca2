"""docs/engine.md: the bytes it names are those that the plan counts, and tests/core/plan holds the plan to autograd."""

import re

from benchmarks.shapes import config_of
from core.models.families import FAMILIES
from core.plan.memory import kept_per_token
from core.plan.work import work_of
from tests.conftest import ROOT
from tests.core.train.runs import spec_of

PAGE = (ROOT / "docs" / "engine.md").read_text()


def test_its_bytes_are_the_plans() -> None:
    spec = spec_of(tuning={"kind": "lora", "rank": 16, "alpha": 32.0}, memory={"precision": "bf16"})
    work = work_of(
        spec, architecture="LlamaForCausalLM", parameters=6_738_415_616, config=config_of("llama2-7b"), counts=None, steps=None
    )
    counted = [round(kept_per_token(work, tier)) for tier in ("plain", "packed", "fused")]
    assert [int(number.replace(",", "")) for number in re.findall(r"([0-9]{2,3},[0-9]{3}) bytes", PAGE)] == counted
    (gib,) = re.findall(r"([0-9.]+) GiB for every thousand tokens", PAGE)
    assert float(gib) == round(counted[0] * 32 * 1000 / 2**30, 1)


def test_it_names_the_files_there_are() -> None:
    folders = (ROOT, ROOT / "core" / "train" / "fused")
    for path in re.findall(r"`([a-z0-9_/]+\.py)`", PAGE):
        assert any((folder / path).is_file() for folder in folders), path


def test_it_names_every_fused_family() -> None:
    named = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "glm": "GLM", "glm4": "GLM-4"}
    assert set(named) == set(FAMILIES)
    sentence = PAGE.split("`memory.fused_layers`, for ")[1].split("(")[0]
    assert all(name in sentence for name in named.values())
