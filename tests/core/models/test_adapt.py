"""Every tuning goes through its folder unharmed, and others' libraries find in it what was trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ArtifactError, BadSpec
from core.models.adapt import attach_adapter, load_adapter, save_lora, saved_rank
from core.models.load import Quantization, dequantized_weight
from core.plan import check_spec
from core.plan.shape import model_shape, trainable_parameters
from core.spec import JobSpec, LoraTuning, MoraTuning
from core.train.training import count_parameters
from tests.core.models.adapters import IDS, TUNINGS, Trained, load, logits_of, trained
from tests.tiny import build_tiny_model

# Sums in another order: MoRA is read back as LoRA; rsLoRA at twice the rank divides by another root.
ROUNDING = {"mora": 1e-4, "pissa-rslora-patterns": 1e-4}

CASES: list[tuple[str, Quantization]] = [
    *[(name, "none") for name in TUNINGS],
    *[(name, "nf4") for name in TUNINGS if name != "embeddings"],
    ("default", "nf4-double"),
    ("default", "fp4"),
    ("dora", "fp4-double"),
    ("default", "int8"),
    ("pissa", "int8"),
    ("mora", "int8"),
]


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_what_was_trained_is_what_is_read_back(tiny: Path, tmp_path: Path, name: str, quantization: Quantization) -> None:
    result = trained(tiny, TUNINGS[name], tmp_path / "adapter", quantization)
    assert (result.logits - result.bare).abs().max() > 0.1
    with result.model.disable_adapter():
        assert torch.equal(logits_of(result.model), result.bare)

    again = load_adapter(load(tiny, quantization).model, tmp_path / "adapter", "again")
    assert (logits_of(again) - result.logits).abs().max() <= ROUNDING.get(name, 1e-6)
    assert not any(p.requires_grad for p in again.parameters())
    with again.disable_adapter():
        assert torch.equal(logits_of(again), result.bare)

    # As the trainer does for the parity record: read onto the model that was trained, as one more adapter.
    load_adapter(result.model, tmp_path / "adapter", "saved")
    result.model.set_adapter("saved")
    assert torch.equal(logits_of(result.model), logits_of(again))


# What a user does with a downloaded adapter: nothing of this project is imported.
FRESH = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, ids, *folders = sys.argv[1:]
found = {}
for folder in folders:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    with torch.no_grad():
        found[folder] = model(torch.tensor(json.loads(ids))).logits.flatten().tolist()
print(json.dumps(found))
"""


def test_a_fresh_process_with_peft_alone_gives_the_trained_logits(tiny: Path, tmp_path: Path) -> None:
    results: dict[str, tuple[str, Trained]] = {}
    for name in ("pissa", "pissa-rslora-patterns", "mora", "dora", "embeddings"):
        result = trained(tiny, TUNINGS[name], tmp_path / name)
        results[str(result.folder)] = name, result
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tiny), json.dumps(IDS.tolist()), *results],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, (name, result) in results.items():
        again = torch.tensor(found[folder]).reshape(result.logits.shape)
        assert (again - result.logits).abs().max() < 1e-4, name


def test_every_folder_is_plain_lora_that_names_no_regular_expression_of_a_user(tiny: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for name in TUNINGS:
        model = attach_adapter(load(tiny).model, TUNINGS[name], "test/tiny")
        (tmp_path / name).mkdir()
        save_lora(model, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True
        assert config["base_model_name_or_path"] == "test/tiny"
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        ranks = {n: len(t) for n, t in tensors.items() if n.endswith("lora_A.weight")}
        assert config["r"] == max(ranks.values()) == saved_rank(model)
        kinds = {n.rpartition("_proj.")[2] for n in tensors if "_proj." in n}
        assert kinds == {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if name == "dora" else set())
        found[name] = config, {n.removeprefix("base_model.model.model.layers."): r for n, r in ranks.items()}
    config, ranks = found["patterns"]
    assert ranks["0.self_attn.q_proj.lora_A.weight"] == 2
    assert ranks["1.self_attn.q_proj.lora_A.weight"] == 4
    assert ranks["1.mlp.down_proj.lora_A.weight"] == 6
    assert (config["r"], config["lora_alpha"]) == (6, 16.0)
    assert {k: v for k, v in config["alpha_pattern"].items() if "mlp" not in k} == {
        "gate_proj": 3.0,
        "up_proj": 3.0,
        "down_proj": 3.0,
        "k_proj": 5.0,
    }
    assert config["rank_pattern"][r"model\.layers\.0\.self_attn\.q_proj"] == 2
    config, ranks = found["pissa"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 32.0, {})
    assert found["embeddings"][0]["modules_to_save"] == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_what_trains(tmp_path: Path, tied: bool) -> None:
    folder = build_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    config = json.loads((folder / "config.json").read_text())
    shape = model_shape("LlamaForCausalLM", config)
    for name, tuning in TUNINGS.items():
        fields = {"base_model": "m", "data": {"datasets": [{"dataset_id": "ds_aaaaaaaaaa"}]}, "tuning": tuning.model_dump()}
        spec = JobSpec.model_validate(fields)
        assert check_spec(spec, architecture="LlamaForCausalLM", context_length=512, config=config) == []
        model = attach_adapter(load(folder).model, tuning, "test/tiny")
        assert trainable_parameters(spec, shape, 0) == count_parameters(model)[0], name


def test_only_the_adapter_trains_and_in_fp32(tiny: Path) -> None:
    for name, tuning in TUNINGS.items():
        for precision in ("fp32", "bf16"):
            model = attach_adapter(load(tiny, "none", precision).model, tuning, "test/tiny")
            trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
            assert {p.dtype for p in trainable.values()} == {torch.float32}, name
            odd = [n for n in trainable if ".lora_" not in n and "modules_to_save" not in n]
            assert odd == [], name


def test_a_start_is_the_same_again(tiny: Path) -> None:
    # A resumed run computes anew what is in no checkpoint.
    for init in ("pissa", "olora"):
        first, second = (attach_adapter(load(tiny, "nf4").model, LoraTuning(rank=4, init=init), "test/tiny") for _ in range(2))
        buffers = dict(second.named_buffers())
        frozen = {name: tensor for name, tensor in first.named_buffers() if name.endswith(".origin")}
        assert len(frozen) == 2 * 2 * 7
        assert all(torch.equal(buffers[name], tensor) for name, tensor in frozen.items())
        assert not any(name.endswith(".origin") for name in first.state_dict())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_begins_along_the_largest_singular_directions(tiny: Path, quantization: Quantization, rslora: bool) -> None:
    model = attach_adapter(load(tiny, quantization).model, LoraTuning(rank=4, init="pissa", rslora=rslora), "test/tiny")
    for name in ("self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer = model.get_base_model().model.layers[1].get_submodule(name)
        weight = dequantized_weight(layer.get_base_layer())
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        closest = (left[:, :4] * values[:4]) @ right[:4]
        down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        assert torch.allclose(layer.scaling["default"] * up @ down, closest, atol=1e-6)
        assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-5), "singular values are shared evenly"


def test_olora_begins_with_orthonormal_columns(tiny: Path) -> None:
    model = attach_adapter(load(tiny).model, LoraTuning(rank=4, init="olora"), "test/tiny")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    full, upper = torch.linalg.qr(layer.get_base_layer().weight)
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert torch.allclose(up, full[:, :4], atol=1e-5)
    assert torch.allclose(down, upper[:4], atol=1e-5)


def test_dropout_is_honoured_by_every_tuning_that_has_it(tiny: Path) -> None:
    for init in ("default", "pissa", "olora"):
        model = attach_adapter(load(tiny).model, LoraTuning(rank=4, init=init, dropout=0.5), "test/tiny")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        steady = logits_of(model)
        assert torch.equal(logits_of(model), steady)
        model.train()
        with torch.no_grad():
            noisy = [model(IDS).logits for _ in range(2)]
        assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize("tied", [True, False])
def test_trained_embeddings_stay_as_tied_as_the_model_has_them(tmp_path: Path, tied: bool) -> None:
    folder = build_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    tuning = LoraTuning(rank=4, train_embeddings=True)
    result = trained(folder, tuning, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    embedding = tensors["base_model.model.model.embed_tokens.weight"]
    head = tensors["base_model.model.lm_head.weight"]
    assert torch.equal(embedding, head) is tied
    whole = [p for n, p in result.model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert len(whole) == (1 if tied else 2)
    assert not torch.equal(embedding, load(folder).model.get_input_embeddings().weight)
    again = load_adapter(load(folder).model, tmp_path / "adapter", "again")
    assert torch.equal(logits_of(again), result.logits)


@pytest.mark.parametrize("family", ["gemma", "phi"])
def test_trained_embeddings_that_are_scaled_or_have_a_bias(tmp_path: Path, family: str) -> None:
    folder = build_tiny_model(tmp_path / "model", family=family, tie_word_embeddings=family == "gemma")
    result = trained(folder, TUNINGS["embeddings"], tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    assert ("base_model.model.lm_head.bias" in names) is (family == "phi")
    again = load_adapter(load(folder).model, tmp_path / "adapter", "again")
    assert (logits_of(again) - result.logits).abs().max() < 1e-6
    model = attach_adapter(load(folder, precision="bf16").model, TUNINGS["embeddings"], "test/tiny")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits_of(model).isfinite().all()


def test_trained_embeddings_of_a_bf16_base_are_written_as_a_loader_holds_them(tiny: Path, tmp_path: Path) -> None:
    model = attach_adapter(load(tiny, precision="bf16").model, TUNINGS["embeddings"], "test/tiny")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.add_(1e-4)  # lost in bf16, kept by the master
    embedding = model.get_base_model().get_input_embeddings()
    assert not torch.equal(embedding.modules_to_save["default"].weight, embedding.original_module.weight.float())
    assert embedding(IDS).dtype == torch.bfloat16
    logits = logits_of(model)
    save_lora(model, tmp_path)
    again = load_adapter(load(tiny, precision="bf16").model, tmp_path, "again")
    assert logits_of(again).dtype == torch.bfloat16
    assert (logits_of(again).float() - logits.float()).abs().max() < 0.05


@pytest.mark.parametrize(
    ("tuning", "part"),
    [
        (LoraTuning(target_modules=["q_proj", "query"]), r"target_modules: query \(not there\); linear modules of this model"),
        (LoraTuning(target_modules=["input_layernorm"]), r"input_layernorm \(not linear\)"),
        (LoraTuning(target_modules=[]), "the list is empty"),
        (MoraTuning(target_modules=["query"]), "not there"),
        (LoraTuning(rank_pattern={"layers.7.*.q_proj": 2}), r"tuning\.rank_pattern: layers\.7\.\*\.q_proj matches none"),
        (LoraTuning(target_modules=["q_proj"], alpha_pattern={"v_proj": 2.0}), "alpha_pattern.*v_proj matches none"),
        (LoraTuning(rank_pattern={"q_proj": 2, "layers.0.*.*": 3}), "another pattern"),
        (LoraTuning(rank=33, init="pissa"), "k_proj has 32 directions for pissa"),
        (LoraTuning(init="olora", rank_pattern={"v_proj": 40}), "v_proj has 32 directions for olora"),
    ],
)
def test_what_the_model_can_not_have_is_refused_by_name(tiny: Path, tuning: LoraTuning | MoraTuning, part: str) -> None:
    with pytest.raises(BadSpec, match=part):
        attach_adapter(load(tiny).model, tuning, "test/tiny")


def test_an_embedding_that_is_missing_from_the_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    result = trained(tiny, TUNINGS["embeddings"], tmp_path / "adapter")
    path = result.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lm_head.weight"]
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lm_head\.weight', which is not in the file"):
        load_adapter(load(tiny).model, result.folder, "again")


def test_mora_trains_as_many_numbers_as_lora_of_its_rank(tiny: Path) -> None:
    counts = {
        name: count_parameters(attach_adapter(load(tiny).model, tuning, "test/tiny"))[0]
        for name, tuning in {"lora": LoraTuning(rank=4), "mora": MoraTuning(rank=4)}.items()
    }
    assert 0.9 * counts["lora"] < counts["mora"] <= counts["lora"]
