"""What the parity record says of every kind of module that an adapter can bring."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.adapter import AdapterFacts, BaseIdentity, ParityRecord, ParityRecordV1, read_parity
from core.data.tokenizer import Tokenizer
from core.errors import InvalidInput
from core.eval.probes import base_distance, batches, measure
from core.manifest import read_manifest
from core.models.adapt import load_adapter
from core.models.load import load_base
from core.models.traces import touched_modules, tracing
from core.train.parity import measure_loaded
from tests.core.train.runs import run_input, spec_of, train_here
from tests.core.train.test_methods import TUNINGS
from tests.lora import add_lora

CPU = torch.device("cpu")
IDENTITY = BaseIdentity(model="t", weights="0" * 64, compute_dtype="fp32")
SEQUENCES = [([5, 9, 30, 77, 2, 100 + n], 1 + n % 3) for n in range(8)]


def base(tiny: Path) -> Any:
    return load_base(tiny, name="t", weights="0" * 64, quantization="none", precision="fp32", device=CPU).model


@pytest.mark.parametrize(
    ("name", "kinds", "modules"),
    [
        ("lora", {"lora"}, 14),
        ("dora", {"dora"}, 14),
        ("pissa", {"lora"}, 14),
        ("mora", {"lora"}, 14),
        ("embeddings", {"lora", "whole"}, 16),
    ],
)
def test_every_tuning_is_recorded_as_it_is_saved(
    tiny: Path, cache: Path, tmp_path: Path, name: str, kinds: set[str], modules: int
) -> None:
    spec = spec_of(**{"optim": {"learning_rate": 5e-3}, **TUNINGS[name]}, schedule={"max_steps": 3})
    train_here(run_input(tiny, cache, spec), tmp_path)
    record = read_parity((tmp_path / "adapter" / "parity.json").read_bytes())
    assert isinstance(record, ParityRecord)
    assert ({module.kind for module in record.modules}, len(record.modules)) == (kinds, modules)
    assert all(module.rms > 0 and module.output_rms > 0 and not module.inert for module in record.modules)
    facts = AdapterFacts.model_validate(read_manifest(tmp_path / "adapter")["facts"])
    assert (record.base, record.template, facts.parity) == (facts.base, facts.template, record.summary())
    assert len((tmp_path / "adapter" / "parity.json").read_bytes()) < 1 << 20


def test_what_a_module_adds_is_what_its_absence_takes_away(tiny: Path, tmp_path: Path) -> None:
    """By the definition: the same inputs through the layer with and without its adapter."""
    model = load_adapter(base(tiny), add_lora(tiny, tmp_path / "a", 1), "a").eval()
    model.set_adapter("a")
    ids = torch.tensor([SEQUENCES[0][0]])
    seen: dict[str, torch.Tensor] = {}
    touched = touched_modules(model, "a")
    for module in touched:
        module.layer.register_forward_pre_hook(lambda _, inputs, path=module.path: seen.__setitem__(path, inputs[0]))  # type: ignore[misc]
    with torch.no_grad(), tracing(touched) as traces:
        model(ids)
    assert list(traces)[:4] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"], "in the order they are met"
    with torch.no_grad():
        for module in touched:
            added = module.layer(seen[module.path]) - module.layer.get_base_layer()(seen[module.path])
            assert traces[module.path].rms == pytest.approx(float(added.square().mean().sqrt()), rel=1e-4)
            last = added[0, -1]
            expected = [float(last[round(k * (len(last) - 1) / 3)]) for k in range(4)]
            assert traces[module.path].sample == pytest.approx(expected, abs=1e-5)


def test_inert_modules_are_told(tiny: Path, tmp_path: Path) -> None:
    model = load_adapter(base(tiny), add_lora(tiny, tmp_path / "a", 1), "a")
    touched = {module.path: module for module in touched_modules(model, "a")}
    layers = {part: f"model.layers.1.self_attn.{part}_proj" for part in "qkv"}
    touched[layers["q"]].layer.lora_B["a"].weight.data.zero_()
    touched[layers["k"]].layer.scaling["a"] = 0.0
    pair = touched[layers["v"]].layer  # neither half is zero, and no path leads through both
    pair.lora_A["a"].weight.data[:2] = 0
    pair.lora_B["a"].weight.data[:, 2:] = 0
    record = measure_loaded(model, "a", SEQUENCES, IDENTITY, Tokenizer.from_folder(tiny), "t")
    assert {module.path for module in record.modules if module.inert} == set(layers.values())
    assert {module.path for module in record.modules if module.rms == 0} == set(layers.values())
    assert set(record.summary().inert) == set(layers.values())


def test_a_sequence_says_the_same_alone_and_in_its_batch(tiny: Path) -> None:
    model = base(tiny)
    sequences = [(ids[: 3 + n % 4], 1) for n, (ids, _) in enumerate(SEQUENCES)]
    assert [len(batch) for batch in batches(sequences)] == [1, 5, 2]
    assert (batches([]), [len(batch) for batch in batches(sequences[:1])]) == ([], [1])
    together = [said for batch in batches(sequences) for said in measure(model, batch)[0]]
    for said, sequence in zip(together, sequences, strict=True):
        ((alone,), traces) = measure(model, [sequence])
        assert said.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert torch.allclose(said.last, alone.last, atol=1e-5)
        assert len(said.last) == min(4, len(sequence[0]))
        assert traces == {}
        assert base_distance(said, alone, [[0, 1, 2]] * len(said.last)) < 1e-5
    with pytest.raises(ValueError, match="start"):
        measure(model, [([1, 2], 2)])


def test_records_of_the_first_version_are_read(tmp_path: Path) -> None:
    probe = {"token_ids": [1, 2], "start": 1, "logprobs": [-1.0], "base_logprobs": [-2.0]}
    old = {"version": 1, "device": "cuda", "compute_dtype": "bf16", "probes": [probe]}
    record = read_parity(json.dumps(old).encode())
    assert isinstance(record, ParityRecordV1)
    assert record.model_dump() == old


def test_a_result_that_does_not_fit_its_own_model_ends_the_run(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.models.adapt.PREFIX", "base_model.model.wrong.")
    with pytest.raises(InvalidInput, match=r"base_model\.model\.wrong\.model\.layers\.0\.mlp\.down_proj\.lora_A\.weight"):
        train_here(run_input(tiny, cache, spec_of(schedule={"max_steps": 1})), tmp_path)
    assert not (tmp_path / "adapter").exists()
