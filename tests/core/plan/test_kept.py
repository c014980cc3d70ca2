"""What the plan counts of a layer is what autograd keeps of it, byte for byte, on a CPU whose attention keeps what a flash
attention keeps. liger's kernels run on a GPU alone: what they keep was read, not seen here."""

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.shapes import config_of
from core.adapter import Quantization
from core.eval import nats
from core.models import documents
from core.plan import fused, memory
from core.plan.memory import kept_per_token
from core.plan.work import Tier, work_of
from core.spec import JobSpec, LoraTuning, MoraTuning
from core.train.fused import graphs, halves, head, layer
from core.train.fused.install import fused_layer, install_fused
from tests.core.train.fused import Flash, Folders, adapted, base_of, folders_in, kept, packed

RANK_3: dict[str, Any] = {"kind": "lora", "rank": 3}
FULL: dict[str, Any] = {"kind": "full"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return folders_in(tmp_path_factory.mktemp)


@pytest.fixture(autouse=True)
def _flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_row_by_row", lambda q, k, v, *_: Flash.apply(q.to(v.dtype), k.to(v.dtype), v))


def counted(folder: Any, family: str, tier: Tier, **fields: Any) -> tuple[float, int]:
    """(bytes of a layer, of the residual stream) for a token, as the plan has it."""
    data = {"datasets": [{"dataset_id": "ds_aaaaaaaaaa"}]}
    spec = JobSpec.model_validate({"base_model": "m", "data": data} | fields)
    config = json.loads((folder / "config.json").read_text())
    architecture = config["architectures"][0]
    work = work_of(spec, architecture=architecture, parameters=1, config=config, counts=None, steps=None)
    return kept_per_token(replace(work, has_kernels=False, longest=300), tier), work.stream_bytes


def saved(
    folders: Folders, family: str, tuning: dict[str, Any], quantization: Quantization, fused: bool, recompute: bool
) -> float:
    """Bytes of a layer for a token, as autograd has it: the difference of two models and of two lengths."""
    found = {}
    for layers in (2, 4):  # the first layer's input has no gradient: it keeps less
        folder = folders(family, layers=layers)
        if tuning["kind"] == "full":
            model = base_of(folder, "fp32")
            model.requires_grad_(True)
            model = packed(model)
        else:
            kind = MoraTuning if tuning["kind"] == "mora" else LoraTuning
            model = adapted(base_of(folder, "bf16", quantization), kind.model_validate(tuning))
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if fused:
            install_fused(model)
        found[layers] = [kept(model, tokens, "bf16") for tokens in (100, 300)]
    few, many = (found[4][n] - found[2][n] for n in (0, 1))
    return (many - few) / 200 / 2


@pytest.mark.parametrize(
    ("family", "tuning"),
    [
        ("llama", RANK_3),
        ("llama", RANK_3 | {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", RANK_3 | {"target_modules": ["down_proj"]}),
        ("llama", {"kind": "mora", "rank": 2}),
        ("llama", FULL),
        ("qwen2", RANK_3),
        ("qwen3", RANK_3),
        ("qwen3", FULL),
        ("phi3", RANK_3),
        ("gemma", RANK_3),
    ],
)
def test_a_layer_of_transformers(folders: Folders, family: str, tuning: dict[str, Any]) -> None:
    wanted, _ = counted(folders(family, layers=1), family, "packed", tuning=tuning)
    assert saved(folders, family, tuning, "none", fused=False, recompute=False) == wanted


@pytest.mark.parametrize(
    ("family", "tuning", "further"),
    [
        ("llama", RANK_3 | {"dropout": 0.1}, 6 * 64 + 128),  # a CPU's masks are in bf16, a GPU's are bytes
        ("glm4", RANK_3, 2 * 2 * 8),  # each layer spreads the rotary table anew, which no other family does
    ],
)
def test_a_layer_that_keeps_a_little_more_here(folders: Folders, family: str, tuning: dict[str, Any], further: int) -> None:
    wanted, _ = counted(folders(family, layers=1), family, "packed", tuning=tuning)
    assert saved(folders, family, tuning, "none", fused=False, recompute=False) == wanted + further


def test_dora_keeps_two_results_of_each_module(folders: Folders) -> None:
    tuning = RANK_3 | {"dora": True}
    wanted, _ = counted(folders("llama", layers=1), "llama", "packed", tuning=tuning)
    found = saved(folders, "llama", tuning, "none", fused=False, recompute=False)
    assert found == wanted


def test_four_bits_change_nothing_of_what_a_layer_keeps(folders: Folders) -> None:
    wanted, _ = counted(folders("llama", layers=1), "llama", "packed", tuning=RANK_3, quantization={"kind": "nf4"})
    assert saved(folders, "llama", RANK_3, "nf4-double", fused=False, recompute=False) == wanted


@pytest.mark.parametrize(("family", "tuning"), [("llama", RANK_3), ("llama", FULL), ("qwen3", RANK_3), ("glm4", RANK_3)])
def test_a_fused_layer(folders: Folders, family: str, tuning: dict[str, Any]) -> None:
    wanted, _ = counted(folders(family, layers=1), family, "fused", tuning=tuning)
    assert saved(folders, family, tuning, "none", fused=True, recompute=False) == wanted


def test_the_plan_knows_the_engine_s_bounds() -> None:
    assert (fused.ATTENDED_AGAIN, fused.CHUNK) == (layer.ATTENDED_AGAIN, halves._CHUNK)
    assert (fused.LOGITS_AT_ONCE, memory.LOGITS_AT_ONCE) == (head.LOGITS_AT_ONCE, nats.LOGITS_PER_CHUNK)


@pytest.mark.parametrize("tokens", [8, 500, 4095, 5793, 16224, 19497, 23171, 50000])
def test_the_plan_rounds_a_step_up_as_its_graph_is(tokens: int) -> None:
    data = {"datasets": [{"dataset_id": "ds_aaaaaaaaaa"}], "max_length": tokens}
    for more, recorded in (({}, True), ({"checkpointing": True, "checkpointing_offload": True}, False)):
        job: dict[str, Any] = {"base_model": "m", "data": data, "memory": {"fused_layers": True} | more}
        spec = JobSpec.model_validate(job | {"batch": {"micro_batch_size": 1}})
        config = config_of("llama-1.1b") | {"max_position_embeddings": 65536}
        work = work_of(spec, architecture="LlamaForCausalLM", parameters=1, config=config, counts=None, steps=None)
        size = graphs.Size.of(tokens, 1, tokens)
        assert (work.held_tokens, work.held_sequences) == ((size.tokens, size.rows) if recorded else (tokens, 1))
        assert fused.is_attended_again(work) == ((size.longest if recorded else tokens) <= layer.ATTENDED_AGAIN)
        assert work.held_trained == tokens


def test_adapters_stand_beside_the_factors_as_they_are_multiplied_with(folders: Folders) -> None:
    for family in ("llama", "glm4"):
        folder = folders(family, layers=2)
        for targets in ("all-linear", ["q_proj", "v_proj"]):
            tuning = RANK_3 | {"target_modules": targets}
            model = adapted(base_of(folder, "bf16"), LoraTuning.model_validate(tuning))
            install_fused(model)
            kept(model, 20, "bf16")
            fused_layers = [fused_layer(each) for each in model.get_base_model().get_decoder().layers]
            pieces = {
                id(part.untyped_storage()): part.untyped_storage().nbytes()
                for each in fused_layers
                for half in (each.attention, each.mlp)
                for projection in half._projections
                if projection._stacked is not None
                for part in (projection._stacked.down, projection._stacked.up)
            }
            data = {"datasets": [{"dataset_id": "ds_aaaaaaaaaa"}]}
            memory_of = {"fused_layers": True, "checkpointing": True, "checkpointing_offload": True}
            spec = JobSpec.model_validate({"base_model": "m", "data": data, "tuning": tuning, "memory": memory_of})
            config = json.loads((folder / "config.json").read_text())
            work = work_of(spec, architecture=config["architectures"][0], parameters=1, config=config, counts=None, steps=None)
            assert fused.standing(work) == sum(pieces.values())


@pytest.mark.parametrize("tuning", [RANK_3, FULL])
def test_a_checkpointed_layer_keeps_the_stream_alone(folders: Folders, tuning: dict[str, Any]) -> None:
    _, stream = counted(folders("llama", layers=1), "llama", "packed", tuning=tuning)
    assert saved(folders, "llama", tuning, "none", fused=False, recompute=True) == stream
    assert saved(folders, "llama", tuning, "none", fused=True, recompute=True) == stream
