"""The adapter folder: others' libraries read it as it is and find in it what was trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.adapter import AdapterFacts, ParityRecord, tolerance
from core.errors import ArtifactError
from core.eval.logprobs import sequence_logprobs
from core.manifest import read_manifest
from core.models.adapt import load_adapter
from core.models.load import Quantization, load_base
from core.run import RunInput
from core.train.build import build_training
from core.train.loop import train
from core.train.tier import plain_attention
from tests.core.train.runs import run_input, spec_of, train_here
from tests.tiny import CHATML

CPU = torch.device("cpu")

# What a user does with the downloaded archive: nothing of this project is imported.
FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, folder, kind, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base if kind == "lora" else folder, dtype=getattr(torch, dtype))
if kind == "lora":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, folder)
model.eval()
found = []
for probe in json.load(open(folder + "/parity.json"))["probes"]:
    ids, start = torch.tensor([probe["token_ids"]]), probe["start"]
    with torch.no_grad():
        table = torch.log_softmax(model(ids).logits[0].float(), -1)
    found.append([table[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])])
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
print(json.dumps([found, text]))
"""


@pytest.mark.parametrize(("kind", "precision"), [("lora", "fp32"), ("full", "bf16")])
def test_a_fresh_process_with_others_libraries_repeats_the_parity_record(
    tiny: Path, cache: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    spec = spec_of(tuning={"kind": kind}, memory={"precision": precision}, optim={"learning_rate": 5e-3})
    train_here(run_input(tiny, cache, spec), tmp_path)
    folder = tmp_path / "adapter"
    record = ParityRecord.model_validate_json((folder / "parity.json").read_bytes())
    assert (len(record.probes), record.compute_dtype, record.device) == (4, precision, "cpu")
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tiny), str(folder), kind, dtype], cwd=tmp_path, capture_output=True, check=True
    )
    found, text = json.loads(done.stdout.splitlines()[-1])
    for probe, logprobs in zip(record.probes, found, strict=True):
        worst = max(abs(a - b) for a, b in zip(probe.logprobs, logprobs, strict=True))
        assert worst < tolerance(precision)
        moved = [abs(a - b) for a, b in zip(probe.logprobs, probe.base_logprobs, strict=True)]
        assert sum(moved) / len(moved) > 10 * worst, "training has changed the answers by more than loading does"
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def trained_logits(run: RunInput, run_dir: Path) -> torch.Tensor:
    """Logits of the model in the trainer's memory, taken as its last event comes."""
    kept: list[Any] = []

    def build(given: RunInput) -> Any:
        kept.append(build_training(given))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.train.loop.build_training", build)
        for event in train(run, run_dir, lambda: False):
            if event.kind == "phase" and event.phase == "saving":
                model = kept[0].model.eval()
                with torch.no_grad(), plain_attention(model):
                    logits = model(torch.arange(3, 40)[None]).logits.clone()
                model.train()
    return logits


@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4-double"])
def test_a_reloaded_adapter_gives_the_very_logits_that_were_trained(
    tiny: Path, cache: Path, tmp_path: Path, quantization: Quantization
) -> None:
    choice = {"kind": "none"} if quantization == "none" else {"kind": "nf4", "double_quantization": quantization == "nf4-double"}
    logits = trained_logits(run_input(tiny, cache, spec_of(quantization=choice)), tmp_path)
    base = load_base(tiny, name="test/tiny", weights="0" * 64, quantization=quantization, precision="fp32", device=CPU)
    facts = AdapterFacts.model_validate(read_manifest(tmp_path / "adapter")["facts"])
    assert facts.base == base.identity
    model = load_adapter(base.model, tmp_path / "adapter", "again").eval()
    with torch.no_grad():
        again = model(torch.arange(3, 40)[None]).logits
        with model.disable_adapter():
            bare = model(torch.arange(3, 40)[None]).logits
    assert torch.equal(again, logits)
    assert not torch.equal(bare, logits)


def test_the_folder_names_its_base_and_no_path(tiny: Path, cache: Path, tmp_path: Path) -> None:
    for kind in ("lora", "full"):
        train_here(run_input(tiny, cache, spec_of(tuning={"kind": kind})), tmp_path / kind)
        folder = tmp_path / kind / "adapter"
        for path in folder.iterdir():
            assert str(tiny).encode() not in path.read_bytes(), path.name
        assert (folder / "chat_template.jinja").read_text() == CHATML
        assert json.loads((folder / "training.json").read_text())["tuning"]["kind"] == kind
    config = json.loads((tmp_path / "lora/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "test/tiny"


def test_the_chosen_template_goes_with_the_adapter(tiny: Path, cache: Path, tmp_path: Path) -> None:
    spec = spec_of(data={"datasets": [{"dataset_id": "ds_00000000"}], "template": "alpaca"}, schedule={"max_steps": 1})
    train_here(run_input(tiny, cache, spec), tmp_path)
    assert "### Response:" in (tmp_path / "adapter/chat_template.jinja").read_text()


def test_the_same_run_leaves_the_same_digests(tiny: Path, cache: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        train_here(run_input(tiny, cache, spec_of()), tmp_path / name)
        files.append(read_manifest(tmp_path / name / "adapter")["files"])
    assert files[0] == files[1]


@pytest.mark.parametrize("damage", ["renamed", "missing"])
def test_an_adapter_that_fits_only_in_part_is_refused(tiny: Path, cache: Path, tmp_path: Path, damage: str) -> None:
    train_here(run_input(tiny, cache, spec_of(schedule={"max_steps": 2})), tmp_path)
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if "q_proj.lora_B" in n)
    tensor = tensors.pop(name)
    if damage == "renamed":
        tensors[name.replace("q_proj", "query")] = tensor
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    base = load_base(tiny, name="t/t", weights="0", quantization="none", precision="fp32", device=CPU)
    with pytest.raises(ArtifactError, match="adapter tensors"):
        load_adapter(base.model, tmp_path / "adapter", "broken")


def test_logprobs_are_those_of_the_definition(tiny: Path) -> None:
    base = load_base(tiny, name="t/t", weights="0", quantization="none", precision="fp32", device=CPU)
    ids = [5, 9, 30, 77, 2]
    with torch.no_grad():
        table = base.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = [table[t - 1, ids[t]].item() for t in (2, 3, 4)]
    assert sequence_logprobs(base.model, ids, 2) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="start"):
        sequence_logprobs(base.model, ids, 0)
