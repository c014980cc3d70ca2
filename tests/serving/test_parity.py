"""The parity record against what goes wrong between training and serving: each fault is refused, and its place is named.

Manifests are made anew after a change, since they would find any file that is not the one published.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.adapter import ADAPTER_KIND, PARITY_FILE, ParityRecord
from core.data.tokenizer import Tokenizer
from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine
from core.manifest import MANIFEST, closed_folder, folder_digest, read_manifest
from core.models.load import Precision, Quantization, load_base
from serving.verify import Verdict, bring_up, release
from tests.core.train.runs import run_input, spec_of, train_here, write_cache
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"
LAYER = "model.layers.{}.self_attn.{}_proj"
TEXTS = [
    f"user\nWhat is {a} and {b}?\nassistant\nThe sum of {a} and {b} is {a + b}, so the answer is Paris."
    for a in range(5)
    for b in range(6)
]

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many heads for keys as for queries: their adapters fit in each other's places."""
    torch.set_num_threads(1)
    return build_tiny_model(tmp_path_factory.mktemp("parity") / "model", num_key_value_heads=4)


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The adapter folder of a short training, made once for every choice of options."""
    tokenizer = Tokenizer.from_folder(model)
    rows = []
    for text in TEXTS:
        ids, _ = tokenizer.encode(text, parse_special=True)
        rows.append((ids, [0] * 8 + [1] * (len(ids) - 8)))
    cache = write_cache(tmp_path_factory.mktemp("rows") / "tokens", rows)
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            tuning = {"kind": "lora", "rank": 4, "alpha": 8.0}
            data = {"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 18}
            spec = spec_of(**{"tuning": tuning, "data": data, "optim": {"learning_rate": 5e-3}, **options})
            folder = tmp_path_factory.mktemp("run")
            train_here(run_input(model, cache, spec), folder)
            made[key] = folder / "adapter"
        return made[key]

    return make


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def base_of(model: Path, quantization: Quantization = "none", precision: Precision = "fp32") -> AdaptedBase:
    options: dict[str, Any] = {"name": "test/tiny", "weights": "0" * 64, "device": CPU}
    return AdaptedBase(load_base(model, quantization=quantization, precision=precision, **options))


def serve(folder: Path, base: AdaptedBase, engine: Engine, tmp_path: Path, change: Change = lambda folder: None) -> Verdict:
    """Bring up a copy of a published folder that was changed before its manifest was made."""
    facts = read_manifest(folder)["facts"]
    copy = tmp_path / "copy"
    with closed_folder(copy, ADAPTER_KIND, facts) as draft:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        (draft / MANIFEST).unlink()
        change(draft)
        facts |= json.loads((draft / "facts").read_text()) if (draft / "facts").exists() else {}
    verdict = bring_up(copy, folder_digest(copy), "one", [base], engine, CPU)
    if verdict.servable is not None:
        servable = verdict.servable
        engine.call(lambda: release(servable))
    assert not hasattr(base.model, "peft_config"), "nothing is left in memory"
    return verdict


def refusal(verdict: Verdict) -> tuple[str, str]:
    """(the check that failed, why)."""
    assert verdict.servable is None
    failed = verdict.checks[-1]
    assert [check.passed for check in verdict.checks] == [True] * (len(verdict.checks) - 1) + [False]
    return failed.name, failed.numbers["reason"]


def change_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def apply(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def change_config(**entries: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return apply


def test_what_was_trained_passes_and_its_numbers_stand_in_the_receipts(
    model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path
) -> None:
    folder = trained()
    assert (folder / PARITY_FILE).stat().st_size < 1 << 20
    record = ParityRecord.model_validate_json((folder / PARITY_FILE).read_bytes())
    assert (len(record.probes), len(record.modules)) == (16, 14)
    assert all(len(probe.top) == 4 and len(top.ids) == 8 for probe in record.probes for top in probe.top)
    assert record.modules[0].path == LAYER.format(0, "q")
    checks = {check.name: check.numbers for check in serve(folder, base_of(model), engine, tmp_path).checks}
    assert list(checks) == ["manifest", "base_identity", "load", "template", "token_ids", "modules", "parity", "effect"]
    assert all(numbers.pop("seconds") >= 0 for numbers in checks.values())
    assert checks["token_ids"] == {"probes": 16, "with_text": 16}
    assert checks["modules"] | {"max_relative_difference": 0.0} == {
        "modules": 14,
        "inert": 0,
        "unreached": 0,
        "max_relative_difference": 0.0,
        "tolerance": 1e-3,
    }
    assert checks["modules"]["max_relative_difference"] < 1e-5
    assert checks["parity"]["max_logit_difference"] < 1e-5
    assert checks["parity"]["logit_tolerance"] == 1e-4


def test_swapped_queries_and_keys(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        other = {"q_proj": "k_proj", "k_proj": "q_proj"}
        return {next((n.replace(a, b) for a, b in other.items() if a in n), n): tensor for n, tensor in tensors.items()}

    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path, change_tensors(swap)))
    assert check == "modules"
    assert reason.startswith(f"{LAYER.format(0, 'q')} adds ")


def test_modules_that_add_as_much_but_not_the_same(
    model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path
) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = f"base_model.model.{LAYER.format(1, 'v')}.lora_B.weight"
        return tensors | {name: tensors[name].flip(0).contiguous()}

    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path, change_tensors(turn)))
    assert (check, reason.split()[0]) == ("modules", LAYER.format(1, "v"))
    assert "not the same" in reason


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_scale(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path, precision: Precision) -> None:
    folder = trained(memory={"precision": precision})
    base = base_of(model, precision=precision)
    verdict = serve(folder, base, engine, tmp_path)
    assert verdict.servable is not None, verdict.reason
    verdict = serve(folder, base, engine, tmp_path / "all", change_config(lora_alpha=16.0))
    assert refusal(verdict)[1].startswith(f"{LAYER.format(0, 'q')} adds ")
    numbers = verdict.checks[-1].numbers
    assert numbers["adds"] == pytest.approx(2 * numbers["added_in_training"], rel=1e-2)
    one = change_config(alpha_pattern={"model.layers.1.mlp.up_proj": 9.0})
    assert refusal(serve(folder, base, engine, tmp_path / "one", one))[1].startswith("model.layers.1.mlp.up_proj adds ")


def test_a_module_that_adds_nothing(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = f"base_model.model.{LAYER.format(1, 'o')}.lora_B.weight"
        return tensors | {name: torch.zeros_like(tensors[name])}

    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path, change_tensors(zero)))
    assert (check, reason) == ("modules", f"{LAYER.format(1, 'o')} adds nothing here, and was not inert in training")


def test_a_missing_layer(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path) -> None:
    without = change_tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1." not in name})
    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path, without))
    assert check == "load"
    assert "layers.1." in reason

    def without_a_word(folder: Path) -> None:
        without(folder)
        change_config(layers_to_transform=[0], layers_pattern="layers")(folder)

    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path / "config", without_a_word))
    assert (check, reason) == ("modules", f"{LAYER.format(1, 'q')} was trained, and nothing is there for it here")


def test_another_template(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_start|>", "<|start|>"))

    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path, change))
    assert check == "template"
    assert "another chat template" in reason


def test_another_tokenizer(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        record = ParityRecord.model_validate_json((folder / PARITY_FILE).read_bytes())
        one, other = (next(t for t, i in vocabulary.items() if i == record.probes[0].token_ids[place]) for place in (5, 7))
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(content))

    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path, change))
    assert check == "token_ids"
    assert reason.startswith("probe 0, token 5: its text gives the id ")


def test_a_base_in_another_precision_than_it_was_quantised_to(
    model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path
) -> None:
    folder = trained(quantization={"kind": "nf4"})
    verdict = serve(folder, base_of(model, "nf4-double"), engine, tmp_path)
    assert verdict.servable is not None, verdict.reason
    plain = base_of(model)
    check, reason = refusal(serve(folder, plain, engine, tmp_path / "honest"))
    assert check == "base_identity"
    assert "quantization nf4-double" in reason
    assert "quantization none" in reason

    claim = plain.identity.model_dump()

    def lie(folder: Path) -> None:
        (folder / "facts").write_text(json.dumps({"base": claim}))

    def lie_twice(folder: Path) -> None:
        lie(folder)
        record = ParityRecord.model_validate_json((folder / PARITY_FILE).read_bytes())
        (folder / PARITY_FILE).write_text(record.model_copy(update={"base": plain.identity}).model_dump_json())

    check, reason = refusal(serve(folder, plain, engine, tmp_path / "lie", lie))
    assert check == "parity"
    assert "the manifest says test/tiny (weights 000000000000, quantization none" in reason
    check, reason = refusal(serve(folder, plain, engine, tmp_path / "twice", lie_twice))
    assert check in ("modules", "parity")
    assert "in training" in reason


def test_a_file_that_was_cut_short(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:-100])

    check, reason = refusal(serve(trained(), base_of(model), engine, tmp_path, cut))
    assert check == "load"
    assert WEIGHTS in reason


def test_a_spoiled_record(model: Path, trained: Callable[..., Path], engine: Engine, tmp_path: Path) -> None:
    """Logits, ids, distances and modules are all held to: none can be changed without a word."""

    def of(change: Callable[[dict[str, Any]], None]) -> tuple[str, str]:
        def apply(folder: Path) -> None:
            record = json.loads((folder / PARITY_FILE).read_text())
            change(record)
            (folder / PARITY_FILE).write_text(json.dumps(record))

        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return refusal(serve(trained(), base, engine, tmp_path, apply))

    base = base_of(model)

    def logit(record: dict[str, Any]) -> None:
        record["probes"][3]["top"][1]["logits"][5] += 2e-4

    def first(record: dict[str, Any]) -> None:
        top = record["probes"][4]["top"][2]
        row = int(torch.tensor(top["logits"]).argmin())
        top["ids"], top["logits"] = [top["ids"][row]] * 2, [top["logits"][row], top["logits"][row] - 1]

    def outside(record: dict[str, Any]) -> None:
        record["probes"][0]["top"][0]["ids"][0] = 10**6

    def position(record: dict[str, Any]) -> None:
        record["probes"][0]["top"][0]["position"] += 1

    def distance(record: dict[str, Any]) -> None:
        record["probes"][2]["base_distance"] *= 1.2

    def base_answers(record: dict[str, Any]) -> None:
        for probe in record["probes"]:
            probe["base_logprobs"] = [value - 0.01 for value in probe["base_logprobs"]]

    def module(record: dict[str, Any]) -> None:
        del record["modules"][4]

    check, reason = of(logit)
    assert (check, reason.split(",")[0]) == ("parity", "probe 3")
    assert "the logit of id" in reason
    assert of(first)[0] == "parity"
    assert "ids that are not there" in of(outside)[1]
    assert "no logits of its last" in of(position)[1]
    check, reason = of(distance)
    assert (check, reason.split(":")[0]) == ("effect", "probe 2")
    assert of(base_answers)[1].startswith("the base alone differs")
    assert of(module) == ("modules", "model.layers.0.mlp.gate_proj is changed by the adapter here, and was not in training")
