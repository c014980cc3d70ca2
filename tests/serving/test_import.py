"""An adapter that peft trained elsewhere, from the operator's command to its answers; and what is refused on the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.adapter import PARITY_FILE, AdapterFacts, ParityRecord
from core.data.tokenizer import Tokenizer
from core.errors import InvalidInput
from core.eval.logprobs import sequence_logprobs
from core.manifest import read_manifest
from core.models.canonical import check_keys
from core.models.load import load_base
from core.train.adopt import adopt
from store.admin import main
from store.settings import Settings
from store.tables import Adapter, AdapterVersion, Audit
from tests.lora import copy_tokenizer, fresh_answer
from tests.serving.conftest import Published, Service, running

WEIGHTS = "adapter_model.safetensors"


def by_hand(model: Path, folder: Path, **options: Any) -> Path:
    """What `save_pretrained` of peft leaves, in bf16 as trainers often do."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(base, LoraConfig(**{**chosen, **options}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def bring(settings: Settings, folder: Path, *options: str) -> int:
    return main(
        ["adapters", "import", str(folder), "--base", "tiny", "--precision", "fp32", "--device", "cpu", *options], settings
    )


def versions(service: Service) -> list[AdapterVersion]:
    with service.database.transaction() as session:
        return list(session.query(AdapterVersion).order_by(AdapterVersion.version))


def test_an_imported_adapter_answers_as_peft_does(prepared: Service, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = by_hand(prepared.model, tmp_path / "elsewhere")
    texts = tmp_path / "texts"
    texts.write_text("What is the capital of France?\n\nGive three tips for staying healthy.\n")
    assert bring(prepared.settings, folder, "--name", "guest", "--texts", str(texts)) == 0, capfd.readouterr().err
    (version,) = versions(prepared)
    assert (version.version, version.job_id, version.facts["base"]["model"]) == (1, None, "tiny")
    with prepared.database.transaction() as session:
        assert session.get(Adapter, version.adapter_id).name == "guest"  # type: ignore[union-attr]
        assert [row.action for row in session.query(Audit)] == ["adapter.import"]
    published = Published(version.adapter_id, 1, prepared.storage.fetch_folder(f"adapters/{version.sha256}"))
    record = ParityRecord.model_validate_json((published.folder / PARITY_FILE).read_bytes())
    assert [probe.text for probe in record.probes] == [line for line in texts.read_text().splitlines() if line]
    assert {module.kind for module in record.modules} == {"lora"}
    prepared.deploy(published)
    with running(prepared) as service:
        service.wait_routable("guest")
        given = service.ask("guest", prompt="The quick brown fox", return_token_ids=True, logprobs=True).json()
    base = AutoModelForCausalLM.from_pretrained(prepared.model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(folder)).eval()
    ids, _ = Tokenizer.from_folder(prepared.model).encode("The quick brown fox", parse_special=True)
    expected, logprobs = fresh_answer(peft, ids, len(given["token_ids"]))
    assert given["token_ids"] == expected
    assert given["logprobs"] == pytest.approx(logprobs, abs=1e-4)


def test_what_can_not_be_proven_is_refused_with_reasons(
    prepared: Service, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refusal(folder: Path, *options: str) -> str:
        assert bring(prepared.settings, folder, *options) == 1
        return capfd.readouterr().err

    pickled = by_hand(prepared.model, tmp_path / "pickled")
    torch.save(load_file(pickled / WEIGHTS), pickled / "adapter_model.bin")
    (pickled / WEIGHTS).unlink()
    config = json.loads((pickled / "adapter_config.json").read_text())
    config |= {"bias": "all", "init_lora_weights": "pissa", "fan_in_fan_out": True, "task_type": "SEQ_CLS", "from_the_future": 1}
    (pickled / "adapter_config.json").write_text(json.dumps(config))
    shown = refusal(pickled)
    assert "adapter_model.bin is a pickle, which is never read" in shown
    for name in ("bias is 'all'", "init_lora_weights is 'pissa'", "fan_in_fan_out is True", "task_type", "from_the_future is 1"):
        assert name in shown

    assert "There is no model other" in refusal(pickled, "--base", "other")
    assert "There is no project" in refusal(pickled, "--project", "prj_none")
    assert "is the name of a model" in refusal(pickled, "--name", "tiny")
    assert "can't be an adapter's name" in refusal(pickled, "--name", "No Name")
    assert versions(prepared) == []


def adopted(model: Path, folder: Path) -> Path:
    """The result of `adopt`, in this process."""
    base = load_base(model, name="tiny", weights="0" * 64, quantization="none", precision="fp32", device=torch.device("cpu"))
    adopt(folder, base, model, folder.with_name("result"))
    return folder.with_name("result")


def test_dora_of_several_ranks_is_measured_as_peft_computes_it(tiny_model: Path, tmp_path: Path) -> None:
    folder = by_hand(tiny_model, tmp_path / "dora", use_dora=True, use_rslora=True, rank_pattern={"v_proj": 6})
    result = adopted(tiny_model, folder)
    facts = AdapterFacts.model_validate(read_manifest(result)["facts"])
    record = ParityRecord.model_validate_json((result / PARITY_FILE).read_bytes())
    assert (facts.rank, facts.job_id, facts.parity) == (6, None, record.summary())
    assert ({module.kind for module in record.modules}, len(record.modules), len(record.probes)) == ({"dora"}, 6, 8)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(folder)).eval()
    for probe in record.probes:
        assert sequence_logprobs(peft, probe.token_ids, probe.start) == pytest.approx(probe.logprobs, abs=1e-4)


def test_what_fits_the_base_in_part_or_not_at_all_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = by_hand(tiny_model, tmp_path / "part")
    good = load_file(folder / WEIGHTS)

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(InvalidInput) as refused:
            adopted(tiny_model, folder)
        assert not folder.with_name("result").exists()
        return str(refused.value)

    key = next(name for name in good if "q_proj.lora_B" in name)
    shown = refusal({name.replace("q_proj", "query"): tensor for name, tensor in good.items()})
    assert f"{key.replace('q_proj', 'query').replace('lora_B', 'lora_A')} names no module of the model, and 3 more" in shown
    assert "adds nothing to its base" in refusal({n: t * 0 if "lora_B" in n else t for n, t in good.items()})
    assert f"{key} holds numbers that are not finite" in refusal(good | {key: good[key] / 0})
    save_file(good, folder / WEIGHTS)
    copy_tokenizer(tiny_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["T"], vocabulary["Q"] = vocabulary["Q"], vocabulary["T"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "its tokenizer gives other ids than the base's" in refusal(good)


def test_every_key_is_held_to_its_module(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    folder = by_hand(tiny_model, tmp_path / "adapter")
    check_keys(model, folder)
    good = load_file(folder / WEIGHTS)
    start = "base_model.model.model.layers.0.self_attn.v_proj"
    embedding = "base_model.model.model.embed_tokens"

    def reasons(changes: dict[str, torch.Tensor | None], whole: tuple[str, ...] = ()) -> str:
        tensors = {name: tensor for name, tensor in (good | changes).items() if tensor is not None}
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(InvalidInput) as refused:
            check_keys(model, folder, whole)
        return "; ".join(problem.message for problem in refused.value.problems)

    assert f"{start}.lora_A.weight is missing" in reasons({f"{start}.lora_A.weight": None})
    assert "[64, 4], and [32, 4] fits its module" in reasons({f"{start}.lora_B.weight": torch.zeros(64, 4)})
    assert "does not begin with base_model.model." in reasons({"model.layers.0.weight": torch.zeros(1)})
    assert "modules_to_save" in reasons({f"{embedding}.weight": torch.zeros(512, 64)})
    assert "has the shape [513, 64]" in reasons({f"{embedding}.weight": torch.zeros(513, 64)}, ("embed_tokens",))
    assert "names no parameter of" in reasons({f"{embedding}.bias": torch.zeros(64)}, ("embed_tokens",))
    linear = {f"{embedding}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
    assert "not linear" in reasons(linear)
    assert "holds no LoRA weights" in reasons(dict.fromkeys(good) | {f"{embedding}.weight": torch.zeros(512, 64)})
    save_file(good | {f"{embedding}.weight": torch.zeros(512, 64)}, folder / WEIGHTS)
    check_keys(model, folder, ("embed_tokens",))
