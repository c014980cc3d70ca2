"""Memory of a 7B, part by part, against numbers worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import _rows, spec_of_case
from benchmarks.results import FOLDER
from benchmarks.shapes import config_of
from core.data.tokens import TokenCache
from core.eval.layout import Padded
from core.plan.coefficients import Coefficients
from core.plan.memory import GIB, estimate_memory, kept_per_token
from core.plan.work import work_of
from core.records import MemoryEstimate
from core.spec import JobSpec
from core.train.batches import TrainingRows, WeightedRows
from tests.core.plan.jobs import PARAMETERS_7B, counted, equal, spec, work
from tests.core.train.runs import write_cache

LINEAR = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
HEAD = 32000 * 4096
ADAPTER = 19_988_480  # LoRA of rank 8 on all linear modules
FULL: dict[str, Any] = {"kind": "full"}
NF4: dict[str, Any] = {"kind": "nf4"}
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


def memory(job: JobSpec, *counts: Any) -> MemoryEstimate:
    return estimate_memory(work(job, *counts), Coefficients())


def batch(rows: int, times: int = 1, **fields: Any) -> dict[str, Any]:
    return {"micro_batch_size": rows, "gradient_accumulation_steps": times} | fields


def test_every_part_of_lora() -> None:
    found = memory(spec(batch=batch(8, 4)))  # 4096 packed tokens at once, four times
    assert found.weights_gib * GIB == pytest.approx(2 * PARAMETERS_7B + (4 + 2) * ADAPTER)
    assert found.gradients_gib * GIB == pytest.approx(4 * ADAPTER)
    assert found.optimizer_gib * GIB == pytest.approx(8 * ADAPTER)
    # liger: two norms, what each group of modules reads (stream, stream, product), heads, gate and up; 8 numbers a module.
    layer = 2 * (2 * 4096 + 2 * 4096 + 11008 + 4 * 4096 + 2 * 11008 + 7 * 8) + 4 * (32 + 2)
    ends = 3 * 2 * 4096 + 2 * 128 * 2 + 24
    assert found.activations_gib * GIB == pytest.approx(4096 * (32 * layer + ends))
    assert found.logits_gib * GIB == pytest.approx(12 * 2**26), "a chunk of them"
    assert found.workspace_gib == pytest.approx(0.15), "a layer's backward pass fits where the logits were"
    assert found.total_gib == pytest.approx(sum(getattr(found, f"{part}_gib") for part in PARTS))


def test_every_part_of_full_tuning() -> None:
    found = memory(spec(tuning=FULL, batch=batch(8, 4)))
    assert found.weights_gib * GIB == pytest.approx(4 * PARAMETERS_7B + 2 * (LINEAR + HEAD)), "autocast holds copies"
    assert found.gradients_gib * GIB == pytest.approx(4 * PARAMETERS_7B)
    assert found.optimizer_gib * GIB == pytest.approx(8 * PARAMETERS_7B)
    # The stream is fp32, and each of five modules that read it has a copy.
    layer = 4 * 2 * 4096 + 2 * (5 * 4096 + 11008 + 4 * 4096 + 2 * 11008) + 4 * (32 + 2)
    ends = 3 * 4 * 4096 + 2 * 128 * 4 + 24
    assert found.activations_gib * GIB == pytest.approx(4096 * (32 * layer + ends))


def test_weights_match_what_is_known_of_a_7b_model() -> None:
    nf4 = memory(spec(quantization=NF4))
    assert nf4.weights_gib == pytest.approx(3.7, abs=0.1)
    single = memory(spec(quantization=NF4 | {"double_quantization": False}))
    assert (single.weights_gib - nf4.weights_gib) * GIB * 8 / LINEAR == pytest.approx(0.373, abs=0.002)
    assert memory(spec(quantization={"kind": "fp4"})) == nf4
    int8 = memory(spec(quantization={"kind": "int8"}))
    assert (int8.weights_gib - nf4.weights_gib) * GIB / LINEAR == pytest.approx(1 - 0.5 - 0.127 / 8, abs=0.001)

    fp8 = memory(spec(quantization={"kind": "fp8"}))
    assert fp8.weights_gib == int8.weights_gib


def test_fp8_needs_a_matrix_turned_over_and_the_codes_of_what_it_rounds() -> None:
    def workspace(kind: str, rows: int, **memory: bool) -> float:
        changed = spec(quantization={"kind": kind}, memory=memory, batch=batch(rows, 2))
        job = replace(work(changed), held_trained=8, probed_tokens=0)  # no logits to hide behind
        return estimate_memory(job, Coefficients()).workspace_gib * GIB

    tokens, matrix = 64 * 512, 4096 * 11008
    apart = [workspace("fp8", 64, fused_layers=fused) - workspace("none", 64, fused_layers=fused) for fused in (True, False)]
    # Fused, three of the stream's width are wider than the gate's gradient, and less than that with its codes.
    assert apart[0] == pytest.approx(2 * matrix + tokens * (4 * 11008 - 3 * 2 * 4096))
    assert apart[1] == pytest.approx(matrix + 9 * tokens * 11008)
    # Gate, up and down are turned over once for all chunks of a layer that is made again.
    again = [workspace(kind, 2, fused_layers=True, checkpointing=True) for kind in ("none", "fp8", "nf4")]
    assert again[0] < again[1] < again[2]


def test_one_matrix_at_a_time_is_unpacked() -> None:
    small: dict[str, Any] = {"batch": batch(1, 2), "data": {"max_length": 8}}  # no logits to hide behind
    packed, plain = (memory(spec(quantization=kind, **small)) for kind in (NF4, {"kind": "none"}))
    assert (packed.workspace_gib - plain.workspace_gib) * GIB == pytest.approx(2 * 4096 * 11008, rel=0.5)
    assert packed.workspace_gib > plain.workspace_gib


def test_where_an_adapter_began_is_kept_beside_it() -> None:
    plain, pissa = memory(spec()), memory(spec(tuning={"kind": "lora", "init": "pissa"}))
    assert pissa.weights_gib - plain.weights_gib == pytest.approx(4 * ADAPTER / GIB)
    assert (pissa.gradients_gib, pissa.optimizer_gib) == (plain.gradients_gib, plain.optimizer_gib)


def test_states_in_8_bits_take_a_quarter_and_paged_ones_make_room() -> None:
    plain, small, paged = (
        memory(spec(tuning=FULL, optim={"kind": kind}, batch=batch(1, 2, packing="off")))
        for kind in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    )
    assert small.optimizer_gib == pytest.approx(plain.optimizer_gib / 4, rel=0.02)
    assert paged.optimizer_gib == 0


def test_gradients_of_a_single_micro_batch_grow_as_activations_go() -> None:
    one, two = (memory(spec(tuning=FULL, batch=batch(16, times))) for times in (1, 2))
    assert one.activations_gib == two.activations_gib
    assert one.gradients_gib == pytest.approx(max(0.0, two.gradients_gib - one.activations_gib))
    assert one.gradients_gib < two.gradients_gib


def test_checkpointing_leaves_the_stream_of_each_layer_and_one_layer() -> None:
    job: dict[str, Any] = {"batch": batch(64, 2)}
    plain, every, second, offloaded = (
        memory(spec(memory=choice, **job))
        for choice in (
            {},
            {"checkpointing": True},
            {"checkpointing": True, "checkpointing_every": 2},
            {"checkpointing": True, "checkpointing_offload": True},
        )
    )
    tokens = 64 * 512
    assert (every.activations_gib - offloaded.activations_gib) * GIB == pytest.approx(tokens * 32 * 2 * 4096)
    assert offloaded.activations_gib < every.activations_gib < second.activations_gib < plain.activations_gib
    halves = (every.activations_gib + plain.activations_gib) / 2
    assert second.activations_gib == pytest.approx(halves)
    layer = kept_per_token(work(spec(**job)), "packed")
    assert (every.logits_gib + every.workspace_gib - 0.15) * GIB == pytest.approx(tokens * (layer + 4 * 11008))


def test_what_is_held_at_once_follows_the_rows() -> None:
    long, short = (work(spec(batch=batch(8, 4)), equal(1000, length)) for length in (512, 100))
    assert (long.held_tokens, long.most_micro_batches) == (8 * 512, 4)
    assert (short.held_tokens, short.most_micro_batches) == (32 * 100, 1), "a whole step, packed, is less than its room"
    padded = work(spec(batch=batch(8, 4, packing="off")), equal(1000, 100))
    assert (padded.tier, padded.held_tokens, padded.most_micro_batches) == ("plain", 800, 4)
    assert work(spec(batch=batch(8, 4, packing="off"))).held_tokens == 8 * 512, "unknown rows are as long as may be"
    assert padded.held_trained == 400


def test_padding_and_crowded_steps_cost_what_lengths_say() -> None:
    varied = counted(1000, tokens=130_000, trained_tokens=65_000, longest=700, squared_tokens=int(1.43 * 130**2 * 1000))
    padded, packed = (work(spec(batch=batch(8, 4, packing=choice)), varied, steps=100) for choice in ("off", "auto"))
    assert padded.held_tokens == 8 * 512, "the longest, cut"
    assert padded.computed_tokens > 1.15 * packed.computed_tokens == pytest.approx(1.15 * 32 * 130)
    assert packed.held_tokens == 8 * 512
    assert packed.most_micro_batches == 2
    assert work(spec(batch=batch(64)), varied, steps=1).held_tokens < work(spec(batch=batch(64)), varied, steps=1000).held_tokens
    assert packed.attended == pytest.approx(1.43 * 130)


def test_both_sequences_of_a_pair_are_in_memory_at_once() -> None:
    pairs, single = (
        work(spec(objective={"kind": kind}, batch=batch(4, packing="off")), equal(100, 40)) for kind in ("orpo", "sft")
    )
    assert pairs.held_tokens == 2 * single.held_tokens


def test_a_packed_run_is_first_compared_with_the_plain_tier() -> None:
    """The plain tier keeps more of a token, and no optimizer state stands yet: it decides where a step has few rows."""
    few = memory(spec(batch=batch(1)), equal(100, 400))
    off = memory(spec(batch=batch(1, packing="off")), equal(100, 400))
    assert (few.optimizer_gib, off.optimizer_gib > 0) == (0, True)
    assert few.activations_gib == off.activations_gib
    many = memory(spec(batch=batch(16)), equal(100, 400))
    assert many.optimizer_gib > 0, "the step itself"


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"data": {"max_length": 256}}, {"data": {"max_length": 512}}),
        ({"batch": batch(16)}, {"batch": batch(17)}),
        ({"tuning": {"kind": "lora", "rank": 8}}, {"tuning": {"kind": "lora", "rank": 64}}),
        ({"tuning": {"kind": "lora", "target_modules": ["q_proj", "v_proj"]}}, {}),
        ({"quantization": NF4}, {}),
        ({"memory": {"checkpointing": True}}, {}),
        ({"batch": batch(16)}, {"batch": batch(16, packing="off")}),
        ({}, {"tuning": {"kind": "lora", "dropout": 0.1}}),
        ({}, {"tuning": FULL}),
    ],
)
def test_more_takes_more(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert memory(spec(**less)).total_gib < memory(spec(**more)).total_gib


def test_attention_in_fp32_keeps_its_scores_and_comes_to_what_an_h100_took(tmp_path: Path) -> None:
    """llama-1.1b/fp32 of benchmarks/memory.py, planned for the largest of the micro-batches that it trained on."""
    job = spec_of_case("fp32")
    cache = TokenCache.open(write_cache(tmp_path / "cache", _rows(14 * 32)))
    rows = TrainingRows([WeightedRows(cache, 1.0)], eval_rows=0, batch=job.batch, seed=job.seed)
    parts = [part for step in range(1, 15) for part in Padded(4).split(rows.step_rows(step))]
    held, trained = max((len(part) * max(row.longest for row in part), sum(row.trained_tokens for row in part)) for part in parts)
    of = work_of(
        job,
        architecture="LlamaForCausalLM",
        parameters=1_100_048_384,
        config=config_of("llama-1.1b"),
        counts=None,
        steps=14,
    )
    assert (of.tier, of.held_tokens, of.longest) == ("plain", held, 512)
    of = replace(of, held_trained=trained)
    found = estimate_memory(of).total_gib
    measured = next(
        row["value"]
        for row in json.loads((FOLDER / "memory-nvidia-h100-80gb-hbm3.json").read_text())["rows"]
        if (row["case"], row["metric"]) == ("llama-1.1b/fp32", "peak_allocated_gib")
    )
    assert found == pytest.approx(measured, rel=0.02)
    without = estimate_memory(replace(of, shape=replace(of.shape, keys=2048), longest=1)).total_gib
    assert without < 0.85 * measured, "most of the difference are the scores"
