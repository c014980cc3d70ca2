"""Fused layers against transformers' and peft's own over the same packed rows: the same numbers by another way.

Every family in small, on a CPU; adapters begin with random B, so that every matrix has a gradient.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.adapter import Quantization
from core.eval.rows import Example, MicroBatch, collate_packed, collate_padded
from core.models.adapt import load_adapter, save_lora
from core.models.load import dequantized_weight
from core.models.targets import find_targets
from core.spec import LoraTuning, MoraTuning, SftObjective
from core.train.fused import halves
from core.train.fused.head import FusedHead
from core.train.fused.install import fused_layer, install_fused, uninstall_fused
from core.train.fused.layer import FusedLayer
from core.train.losses import token_loss
from core.train.tier import plain_attention
from tests.core.models.adapters import TUNINGS
from tests.core.train.fused import (
    CPU,
    FAMILIES,
    Folders,
    adapted,
    apart,
    assert_same,
    base_of,
    examples,
    folders_in,
    kept,
    measured,
    memory,
    packed,
)
from tests.core.train.runs import losses, run_input, spec_of, train_here

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
"""Its cosines and sines are scaled."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return folders_in(tmp_path_factory.mktemp)


@pytest.mark.parametrize("quantization", ["none", "nf4-double", "fp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_packed_tier_s(folders: Folders, family: str, quantization: Quantization) -> None:
    model = adapted(base_of(folders(family), quantization=quantization))
    before, expected = memory(model), measured(model)
    assert "2 of " + family in install_fused(model)
    joined = memory(model)
    assert (joined[0], joined[1] < before[1]) == (before[0], True), "joined weights are no copies"
    found = measured(model)
    assert not found.equals(expected), "another way to the same"
    assert_same(found, expected)
    uninstall_fused(model)
    assert memory(model) == before
    assert measured(model).equals(expected), "as if nothing had been"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("glm", {"attention_bias": True, "num_key_value_heads": 1}),
        ("llama", {"rope_parameters": YARN}),
    ],
)
def test_full_tuning_reaches_every_weight_norm_and_bias(folders: Folders, family: str, settings: dict[str, Any]) -> None:
    model = packed(base_of(folders(family, **settings)).requires_grad_(True))
    expected = measured(model)
    install_fused(model)
    found = measured(model)
    assert found.gradients.keys() == {name for name, _ in model.named_parameters()}
    assert_same(found, expected)


@pytest.mark.parametrize("name", [name for name in TUNINGS if name not in ("dora", "mora")])
def test_other_ranks_scales_starts_and_targets(folders: Folders, name: str) -> None:
    for tuning in (TUNINGS[name], TUNINGS[name].model_copy(update={"target_modules": ["q_proj", "v_proj", "down_proj"]})):
        if tuning.target_modules != "all-linear" and getattr(tuning, "alpha_pattern", None):
            continue  # patterns that match nothing are refused
        model = adapted(base_of(folders("llama")), tuning)
        expected = measured(model)
        install_fused(model)
        assert_same(measured(model), expected)


@pytest.mark.parametrize(
    ("family", "quantization"), [*((family, "none") for family in FAMILIES), ("llama", "nf4-double"), ("glm4", "fp4-double")]
)
def test_in_bf16_no_further_from_the_truth_than_the_packed_tier(
    folders: Folders, family: str, quantization: Quantization
) -> None:
    """The truth is fp32 over the very same weights. Both tiers round, at different places."""
    base = base_of(folders(family), "bf16", quantization)
    exact = base_of(folders(family))
    weights = {f"{path}.weight": dequantized_weight(module) for path, module in find_targets(base, "all-linear").items()}
    weights |= {name: p.float() for name, p in base.state_dict().items() if p.is_floating_point() and name not in weights}
    exact.load_state_dict({name: weights[name] for name in exact.state_dict()})
    truth = measured(adapted(exact))
    model = adapted(base)
    before = measured(model, "bf16")
    install_fused(model)
    after = measured(model, "bf16")
    assert apart(truth.gradients, after.gradients) < 1.1 * apart(truth.gradients, before.gradients)
    assert (after.sums - truth.sums).norm() < 2 * (before.sums - truth.sums).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_know_nothing_of_each_other(folders: Folders, family: str) -> None:
    model = adapted(base_of(folders(family)))
    install_fused(model)
    rows = examples()
    ids, mask = rows[1].sequences[0]
    with torch.no_grad():
        before = token_loss(model, collate_packed(rows, CPU), SftObjective()).sums
        changed = [rows[0], Example((((ids + 7) % 400, mask),)), *rows[2:]]
        after = token_loss(model, collate_packed(changed, CPU), SftObjective()).sums
    assert torch.equal(before != after, torch.arange(len(rows)) == 1)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_make_themselves_again(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, family: str, every: int
) -> None:
    """From their input, or from what the host kept; in one chunk and in many. Batches of unlike lengths, as in a run."""
    batches = [collate_packed(examples(seed, longest=longest), CPU) for seed, longest in ((1, 20), (2, 31), (3, 25))]
    model = adapted(base_of(folders(family, layers=3), quantization="nf4-double"))
    install_fused(model)
    expected, kept_without = [measured(model, batch=batch) for batch in batches], kept(model, 60)
    uninstall_fused(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=every)
    kept_by = {}
    for offload in (False, True):
        install_fused(model, offload=offload)
        kept_by[offload] = kept(model, 60)
        assert [measured(model, batch=batch).equals(wanted) for batch, wanted in zip(batches, expected, strict=True)] == [
            True
        ] * 3
        monkeypatch.setattr(halves, "_CHUNK", 16)
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same(measured(model, batch=batch), wanted)
        monkeypatch.undo()
        uninstall_fused(model)
    assert [layer.gradient_checkpointing for layer in model.get_base_model().model.layers] == [True, every == 1, True]
    assert kept_by[True] < kept_by[False] < kept_without


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_is_checkpointed_in_one_chunk(folders: Folders, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = packed(base_of(folders(family)).requires_grad_(True))
    install_fused(model)
    expected = measured(model)
    uninstall_fused(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    monkeypatch.setattr(halves, "_CHUNK", 16)
    install_fused(model, offload=True)
    assert_same(measured(model), expected)


def test_a_head_that_does_not_train_gives_loss_and_gradient_in_one_pass(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk and in many; where it trains it is left alone, as is who asks for no gradient."""
    model = adapted(base_of(folders("llama")))
    expected = measured(model)
    install_fused(model)
    head = model.get_output_embeddings()
    monkeypatch.setattr("core.train.fused.head.LOGITS_AT_ONCE", 8 * len(head.weight))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", None)
        assert_same(measured(model), expected)
    monkeypatch.setattr(FusedHead, "nats", None)
    with torch.no_grad():
        torch.testing.assert_close(token_loss(model, collate_packed(examples(), CPU), SftObjective()).sums, expected.sums)
    uninstall_fused(model)
    assert "nats" not in vars(head)
    head.weight.requires_grad_(True)
    install_fused(model)
    assert "nats" not in vars(head)


def test_long_rows_keep_what_attention_gave_and_learn_the_same(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base_of(folders("qwen3")))
    install_fused(model)
    expected = measured(model)
    monkeypatch.setattr("core.train.fused.layer.ATTENDED_AGAIN", 8)
    assert measured(model).equals(expected)


def test_a_pass_that_was_given_up_leaves_nothing_behind(folders: Folders) -> None:
    """A GPU whose memory runs out between the passes does the step again."""
    model = adapted(base_of(folders("llama")))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    install_fused(model, offload=True)
    expected = measured(model)
    token_loss(model, collate_packed(examples(9), CPU), SftObjective())
    assert measured(model).equals(expected)


def test_what_is_no_packed_batch_goes_through_the_layers_own(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers from a cache, padded rows, no adapter, another adapter."""
    model = adapted(base_of(folders("qwen3"))).eval()
    ids = torch.arange(3, 33)[None]
    packed_rows, padded_rows = collate_packed(examples(), CPU), collate_padded(examples(), CPU)

    def nats(batch: MicroBatch) -> torch.Tensor:
        return token_loss(model, batch, SftObjective()).sums

    def found() -> list[torch.Tensor]:
        with plain_attention(model):
            first = model(input_ids=ids, use_cache=True)
            second = model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
            found = [first.logits, second.logits, nats(padded_rows)]
        with model.disable_adapter():
            return [*found, nats(packed_rows)]

    with torch.no_grad():
        trained, before = nats(packed_rows), found()
        save_lora(model, tmp_path)
        install_fused(model)
        monkeypatch.setattr(FusedLayer, "_packed", None)
        # A weight's place in memory decides about the last bit of a product with a single row.
        torch.testing.assert_close(found(), before, rtol=1e-5, atol=1e-5)
        with pytest.raises(TypeError, match="not callable"):
            nats(packed_rows)
        load_adapter(model, tmp_path, "saved")
        model.set_adapter("saved")
        torch.testing.assert_close(nats(packed_rows), trained, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoints": {"every_steps": 3}},
        {"quantization": {"kind": "nf4"}},
        {"optim": {"kind": "adamw_8bit", "learning_rate": 5e-3}, "checkpoints": {"every_steps": 3}},
        {"tuning": {"kind": "full"}, "optim": {"learning_rate": 1e-3}},
        {"tuning": {"kind": "lora", "rank": 4, "init": "pissa"}},
        {"memory": {"precision": "fp32", "checkpointing": True}},
    ],
    ids=["lora", "nf4", "8bit", "full", "pissa", "checkpointing"],
)
def test_a_run_learns_the_same_and_leaves_the_same(
    folders: Folders, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    eval_ = {"every_steps": 4, "generation": {"rows": 2, "max_tokens": 4}, "keep_best": True}
    spec = spec_of(**{"eval": eval_} | change)
    own = train_here(run_input(folders("qwen2"), cache, spec), tmp_path / "own")
    memory = spec.memory.model_copy(update={"fused_layers": True})
    with_fused = spec.model_copy(update={"memory": memory})
    fused = train_here(run_input(folders("qwen2"), cache, with_fused), tmp_path / "fused")
    (started,) = (event for event in fused if event.kind == "started")
    assert started.tier == "fused"
    assert "fused layers (2 of qwen2" in started.tier_reason
    assert "gradients" in started.tier_reason
    assert losses(fused) == pytest.approx(losses(own), abs=5e-5)
    assert losses(fused)[-1] < losses(fused)[0]
    held = [[event.eval_loss for event in events if event.kind == "eval"] for events in (own, fused)]
    assert held[1] == pytest.approx(held[0], abs=5e-5)
    name = "model.safetensors" if "full" in str(change) else "adapter_model.safetensors"
    first, second = (load_file(tmp_path / run / "adapter" / name) for run in ("own", "fused"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=2e-3)
    if "checkpoints" in change:
        resumed = train_here(
            run_input(folders("qwen2"), cache, with_fused, resume_from=tmp_path / "fused/checkpoints/step-6"), tmp_path / "again"
        )
        assert losses(resumed) == losses(fused)[6:], "bit for bit"


@pytest.mark.parametrize(
    ("family", "settings", "quantization", "reason"),
    [
        ("gemma", {}, "none", "gemma has no fused layers"),
        ("llama", {"hidden_act": "gelu"}, "none", "silu, not gelu"),
        ("llama", {}, "int8", "Linear8bitLt"),
    ],
)
def test_a_model_that_can_t_be_fused_says_why(
    folders: Folders, family: str, settings: dict[str, Any], quantization: Quantization, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        install_fused(base_of(folders(family, **settings), quantization=quantization))


@pytest.mark.parametrize(
    ("tuning", "reason"),
    [
        (MoraTuning(rank=4), "more than two matrices"),
        (LoraTuning(rank=4, dora=True), "more than two matrices"),
        (LoraTuning(rank=4, dropout=0.1), "no dropout"),
    ],
)
def test_an_adapter_that_can_t_be_fused_is_found_on_the_model(
    folders: Folders, tuning: LoraTuning | MoraTuning, reason: str
) -> None:
    model = adapted(base_of(folders("llama")), tuning)
    with pytest.raises(ValueError, match=reason):
        install_fused(model)
    assert all(fused_layer(layer) is None for layer in model.get_base_model().model.layers)


def test_a_model_is_fused_once(folders: Folders) -> None:
    model = adapted(base_of(folders("llama")))
    install_fused(model)
    with pytest.raises(ValueError, match="already"):
        install_fused(model)
    uninstall_fused(model)
    uninstall_fused(model)
    layer = model.get_base_model().model.layers[0]
    layer.forward = lambda *_, **__: None
    with pytest.raises(ValueError, match="something else"):
        install_fused(model)
