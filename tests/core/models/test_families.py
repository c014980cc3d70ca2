"""Every entry of the catalogue, on a tiny model of its kind: the table tells the truth, losses are the model's own, it learns,
and what it became is what a loader finds.

Windows are a few tokens wide and caps tight, so that one left out anywhere shows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.adapter import ParityRecord, tolerance
from core.catalog import FAMILIES, can_pack
from core.data.tokenizer import Tokenizer
from core.eval import nats
from core.eval.logprobs import sequence_logprobs
from core.eval.rows import Example, MicroBatch, collate_packed, collate_padded
from core.infer.generate import generate
from core.infer.progress import Token
from core.infer.sampling import Sampling
from core.model_folder import read_model_facts
from core.models.adapt import load_adapter
from core.models.documents import DOCUMENTS
from core.models.load import load_base
from core.plan import check_spec, plan
from tests.core.train.runs import losses, random_rows, run_input, spec_of, train_here, write_cache
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")
WINDOW = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 16,
    },
    "phi": {"tie_word_embeddings": False},
    "phi3": {"sliding_window": WINDOW},
    "smollm3": {"no_rope_layers": [1, 0]},
}
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Architecture -> its tiny model."""
    built: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in built:
            family = FAMILIES[architecture].name
            settings = {"initializer_range": 0.1} | SETTINGS.get(family, {})
            built[architecture] = build_tiny_model(tmp_path_factory.mktemp(family) / "model", family=family, **settings)
        return built[architecture]

    return folder


@pytest.fixture(params=FAMILIES)
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def load(folder: Path) -> Any:
    return load_base(folder, name="test/tiny", weights="0" * 64, quantization="none", precision="fp32", device=CPU).model


def examples(longest: int, shortest: int = 4) -> list[Example]:
    """Six rows of ids between `shortest` and `longest`, the longest among them; the first third of each carries no loss."""
    rng = np.random.default_rng(3)
    lengths = [longest, *rng.integers(shortest, longest + 1, 5)]
    ids = [rng.integers(3, 400, length).astype(np.int32) for length in lengths]
    return [Example(((row, (np.arange(len(row)) >= len(row) // 3).astype(np.uint8)),)) for row in ids]


def per_row(model: Any, batch: MicroBatch) -> list[float]:
    found, row = nats.trained_nats(model, batch)
    sums: list[float] = torch.zeros(batch.sequences).index_add_(0, row, found.detach()).tolist()
    return sums


def test_the_entry_names_every_linear_module_but_the_head(folders: Folders, architecture: str) -> None:
    facts = read_model_facts(folders(architecture))
    assert (facts.architecture, facts.allow_remote_code) == (architecture, False)
    assert facts.config["model_type"] == FAMILIES[architecture].name
    model = load(folders(architecture))
    assert type(model).__name__ == architecture
    linear = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert sorted({path.rpartition(".")[2] for path in linear} - {"lm_head"}) == sorted(FAMILIES[architecture].linear_modules)
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize("chunk", [nats.LOGITS_PER_CHUNK, 3 * 512], ids=["at once", "three tokens at a time"])
def test_the_loss_is_the_model_s_own(folders: Folders, architecture: str, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(nats, "LOGITS_PER_CHUNK", chunk)
    model = load(folders(architecture)).requires_grad_(True)
    rows = examples(40)
    ours = per_row(model, collate_padded(rows, CPU))
    for row, found in zip(rows, ours, strict=True):
        ((ids, mask),) = row.sequences
        labels = torch.from_numpy(np.where(mask != 0, ids, -100)[None].astype(np.int64))
        own = model(input_ids=torch.from_numpy(ids[None].astype(np.int64)), labels=labels).loss.item() * row.trained_tokens
        assert found == pytest.approx(own, rel=2e-5)
        start = int(mask.argmax())
        assert found == pytest.approx(-sum(sequence_logprobs(model.eval(), ids.tolist(), start)), rel=2e-5)


def test_a_capped_head_needs_its_cap(folders: Folders) -> None:
    """Gemma 2 and 3 bound their logits; without that the loss would be another one."""
    model = load(folders("Gemma2ForCausalLM"))
    batch = collate_padded(examples(40), CPU)
    capped = sum(per_row(model, batch))
    model.config.final_logit_softcapping = None
    assert abs(sum(per_row(model, batch)) - capped) > 1


def test_attention_is_what_the_model_was_trained_with(folders: Folders, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    model = load(folders(architecture))
    reference = AutoModelForCausalLM.from_pretrained(folders(architecture), attn_implementation="eager").eval()
    ids = collate_padded(examples(40), CPU).input_ids
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=0)
        if architecture == "Gemma2ForCausalLM":  # transformers' sdpa says nothing of the cap that it leaves out
            model.set_attn_implementation("sdpa")
            assert float((model(input_ids=ids).logits - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("longest", [WINDOW, 40])
def test_rows_may_be_packed_where_that_changes_nothing_and_only_there(folders: Folders, architecture: str, longest: int) -> None:
    model = load(folders(architecture))
    reason = can_pack(architecture, read_model_facts(folders(architecture)).config, longest)
    assert reason == can_pack(architecture, model.config.to_dict(), longest)
    rows = examples(longest)
    with torch.no_grad():
        alone = per_row(model, collate_padded(rows, CPU))
        model.set_attn_implementation(DOCUMENTS)
        packed = per_row(model, collate_packed(rows, CPU))
    apart = max(abs(a - b) / b for a, b in zip(packed, alone, strict=True))
    assert (apart < 1e-5) == (reason is None), (apart, reason)


def test_packing_that_would_change_the_model_is_refused_at_submit(folders: Folders) -> None:
    facts = read_model_facts(folders("MistralForCausalLM"))
    known = facts.model_dump(include={"architecture", "context_length", "config"})
    data = {"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 4}
    for packing, max_length, refused in (("on", WINDOW, False), ("on", WINDOW + 1, True), ("auto", WINDOW + 1, False)):
        spec = spec_of(batch={"packing": packing}, data=data | {"max_length": max_length})
        found = [(problem.code, problem.pointer) for problem in check_spec(spec, **known)]
        assert found == ([("packing-impossible", "/batch/packing")] if refused else [])


def test_it_learns_by_lora_as_planned_and_reloads_as_what_it_became(folders: Folders, architecture: str, tmp_path: Path) -> None:
    model = folders(architecture)
    facts = read_model_facts(model)
    spec = spec_of(schedule={"epochs": 4.0}, optim={"learning_rate": 2e-2})
    planned = plan(
        spec,
        architecture=architecture,
        parameters=facts.parameters,
        config=facts.config,
        counts=None,
        budget_gib=None,
    )
    cache = write_cache(tmp_path / "cache", random_rows(40))
    events = train_here(run_input(model, cache, spec), tmp_path / "run")
    started = next(event for event in events if event.kind == "started")
    assert started.trainable_parameters == planned.trainable_parameters > 0
    assert started.total_parameters == facts.parameters + planned.trainable_parameters
    series = losses(events)
    assert np.mean(series[-5:]) < np.mean(series[:5]) - 0.1, series

    adapter = tmp_path / "run" / "adapter"
    record = ParityRecord.model_validate_json((adapter / "parity.json").read_bytes())
    served = load_adapter(load(model), adapter, "it").eval()
    for probe in record.probes:
        found = sequence_logprobs(served, probe.token_ids, probe.start)
        assert found == pytest.approx(probe.logprobs, abs=tolerance("fp32"))
        assert found != pytest.approx(probe.base_logprobs, abs=tolerance("fp32"))


def test_answers_from_the_cache_are_those_of_whole_sequences(folders: Folders, architecture: str) -> None:
    model = load(folders(architecture))
    tokenizer = Tokenizer.from_folder(folders(architecture))
    prompt = examples(30)[0].sequences[0][0].tolist()
    steps = list(generate(model, prompt, Sampling(max_tokens=20), tokenizer, stop_ids=()))
    tokens = [step for step in steps if isinstance(step, Token)]
    assert len(tokens) == 20
    whole = sequence_logprobs(model, prompt + [token.id for token in tokens], start=len(prompt))
    assert [token.logprob for token in tokens] == pytest.approx(whole, abs=1e-4)


LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("architecture", "config", "max_length", "reason"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 100_000, None),
        ("MistralForCausalLM", {"sliding_window": None}, 30_000, None),
        ("MistralForCausalLM", {"sliding_window": 4096}, 4096, None),
        ("MistralForCausalLM", {"sliding_window": 4096}, 4097, "sees 4096 tokens"),
        ("MistralForCausalLM", {}, 5000, "sees 4096 tokens"),  # what transformers takes for granted
        ("Qwen2ForCausalLM", {"sliding_window": 131072, "use_sliding_window": False}, 32768, None),
        ("Qwen2ForCausalLM", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 2}, 1024, "sees 512"),
        ("Qwen3ForCausalLM", {}, 4096, None),
        ("SmolLM3ForCausalLM", {"sliding_window": None, "use_sliding_window": False}, 32768, None),
        ("GemmaForCausalLM", {}, 8192, None),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, 64, "looks ahead"),
        ("Gemma2ForCausalLM", {}, 64, "caps its scores"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, 4096, None),
        ("Gemma3ForCausalLM", {"sliding_window": 512}, 512, None),
        ("Gemma3ForCausalLM", {"sliding_window": 512}, 1024, "sees 512 tokens"),
        ("Gemma3ForCausalLM", {"sliding_window": 512, "layer_types": ["full_attention"]}, 1024, None),
        ("PhiForCausalLM", {"attention_dropout": 0.0, "resid_pdrop": 0.1}, 2048, None),
        ("PhiForCausalLM", {"attention_dropout": 0.1}, 2048, "attention_dropout 0.1"),
        ("Phi3ForCausalLM", {"sliding_window": 2047}, 2048, "sees 2047 tokens"),
        ("Phi3ForCausalLM", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096}, 4096, None),
        ("Phi3ForCausalLM", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096}, 8192, "beyond 4096 tokens"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 2048}, 4096, "beyond 2048"),
        ("ToyForCausalLM", {}, 8, "its own code"),
    ],
)
def test_published_configs_tell_whether_rows_may_be_packed(
    architecture: str, config: dict[str, Any], max_length: int, reason: str | None
) -> None:
    found = can_pack(architecture, config, max_length)
    assert found is None if reason is None else reason in str(found)
