"""Every tuning with every objective: it learns, resumes bit for bit, and reloads as what was trained.

The table of docs/methods.md, row by row: what is not here is refused at submit, and a test below says so.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from core.adapter import ParityRecord, tolerance
from core.eval.logprobs import sequence_logprobs
from core.models.adapt import load_adapter
from core.models.load import load_base, quantization_name
from core.spec import FullTuning
from tests.core.train.runs import losses, random_pairs, random_rows, run_input, spec_of, train_here, write_cache

LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8.0}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 1e-3}},
    "lora": {"tuning": LORA},
    "rslora": {"tuning": LORA | {"rslora": True}},
    "dora": {"tuning": LORA | {"dora": True}},
    "pissa": {"tuning": LORA | {"init": "pissa"}},
    "olora": {"tuning": LORA | {"init": "olora"}},
    "lora-plus": {"tuning": LORA | {"lora_plus_ratio": 4.0}},
    "patterns": {"tuning": LORA | {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.mlp.*": 2.0}}},
    "mora": {"tuning": {"kind": "mora", "rank": 4}},
    "embeddings": {"tuning": LORA | {"train_embeddings": True}, "optim": {"learning_rate": 3e-4}},
    "qlora": {"tuning": LORA, "quantization": {"kind": "nf4"}},
    "qlora-single": {"tuning": LORA, "quantization": {"kind": "nf4", "double_quantization": False}},
    "fp4": {"tuning": LORA, "quantization": {"kind": "fp4"}},
    "int8": {"tuning": LORA, "quantization": {"kind": "int8"}},
    "fp8": {"tuning": LORA, "quantization": {"kind": "fp8"}},
    "qdora": {"tuning": LORA | {"dora": True}, "quantization": {"kind": "nf4"}},
    "qpissa": {"tuning": LORA | {"init": "pissa"}, "quantization": {"kind": "nf4"}},
    "qmora": {"tuning": {"kind": "mora", "rank": 4}, "quantization": {"kind": "nf4"}},
    "fp8-pissa": {"tuning": LORA | {"init": "pissa"}, "quantization": {"kind": "fp8"}},
    "fp8-mora": {"tuning": {"kind": "mora", "rank": 4}, "quantization": {"kind": "fp8"}},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft"},
    "plain_text": {"kind": "plain_text"},
    "dpo": {"kind": "dpo", "beta": 0.5},
    "dpo-hinge": {"kind": "dpo", "loss": "hinge", "beta": 0.5},
    "dpo-ipo": {"kind": "dpo", "loss": "ipo", "beta": 0.5},
    "orpo": {"kind": "orpo"},
}
EVERYWHERE = ("sft", "dpo")
"""The other objectives share all that a tuning touches with these two, and are run with three tunings."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("pairs") / "tokens", random_pairs(28), group=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in random_rows(40)]
    return write_cache(tmp_path_factory.mktemp("texts") / "tokens", rows)


FEW = ("full", "lora", "qlora")
CASES = [(tuning, objective) for tuning in TUNINGS for objective in OBJECTIVES if objective in EVERYWHERE or tuning in FEW]


@pytest.mark.parametrize(("tuning", "objective"), CASES)
def test_it_learns_resumes_and_reloads(
    tiny: Path, cache: Path, pairs: Path, texts: Path, tmp_path: Path, tuning: str, objective: str
) -> None:
    tokens = {"sft": cache, "plain_text": texts}.get(objective, pairs)
    spec = spec_of(
        **{"optim": {"learning_rate": 5e-3}, **TUNINGS[tuning]},
        objective=OBJECTIVES[objective],
        schedule={"epochs": 3.0, "max_steps": 8, "warmup_steps": 2},
        checkpoints={"every_steps": 3},
    )
    events = train_here(run_input(tiny, tokens, spec), tmp_path / "whole")
    series = losses(events)
    before, after = (event for event in events if event.kind == "eval")
    assert min(series[-3:]) < series[0]
    # Trained embeddings learn so few rows by heart; that they learn is seen above.
    assert after.eval_loss < before.eval_loss or tuning == "embeddings"
    if objective.startswith("dpo"):
        start = {"dpo": 0.6931472, "dpo-hinge": 1.0, "dpo-ipo": 1.0}[objective]
        assert before.eval_loss == pytest.approx(start, abs=2e-3), "nothing is won over the reference before training"
    if objective not in ("sft", "plain_text"):
        assert before.eval_perplexity is None
        assert after.eval_reward_margin > before.eval_reward_margin or tuning == "embeddings"

    resumed = run_input(tiny, tokens, spec, tmp_path / "whole" / "checkpoints" / "step-6")
    assert losses(train_here(resumed, tmp_path / "resumed")) == series[6:], "bit for bit"

    folder = tmp_path / "whole" / "adapter"
    record = ParityRecord.model_validate_json((folder / "parity.json").read_bytes())
    cpu = torch.device("cpu")
    options: dict[str, Any] = {"name": "t", "weights": "0" * 64, "precision": "fp32", "device": cpu}
    if isinstance(spec.tuning, FullTuning):
        model = load_base(folder, quantization="none", **options).model
    else:
        base = load_base(tiny, quantization=quantization_name(spec.quantization), **options)
        model = load_adapter(base.model, folder, "again").eval()
    for probe in record.probes:
        found = sequence_logprobs(model, probe.token_ids, probe.start)
        assert max(abs(a - b) for a, b in zip(found, probe.logprobs, strict=True)) < tolerance("fp32")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tuning": {"kind": "full"}, "quantization": {"kind": "nf4"}}, "full tuning can't train quantized weights"),
        ({"tuning": {"kind": "full"}, "quantization": {"kind": "int8"}}, "full tuning can't train quantized weights"),
        ({"tuning": LORA | {"init": "pissa", "dora": True}}, "choose one"),
        ({"tuning": LORA | {"dora": True}, "quantization": {"kind": "int8"}}, "int8"),
        ({"tuning": LORA | {"train_embeddings": True}, "quantization": {"kind": "nf4"}}, "train_embeddings"),
        ({"quantization": {"kind": "nf4"}, "memory": {"compile": True}}, "compile with a quantized base"),
        ({"quantization": {"kind": "fp4"}, "memory": {"precision": "fp16"}}, "fp4 with fp16"),
        ({"objective": {"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing"),
        ({"objective": {"kind": "dpo"}, "eval": {"generation": {}}}, "eval.generation"),
        ({"eval": {"metric": "eval_bleu"}}, "only measured with generation"),
        ({"eval": {"metric": "eval_reward_accuracy"}}, "only measured for preferences"),
        ({"eval": {"early_stopping": {}}}, "set every_steps"),
        ({"memory": {"checkpointing_offload": True}}, "need checkpointing"),
        ({"objective": {"kind": "sft", "train_on": "everything"}, "eval": {"generation": {}}}, "hides where they begin"),
        (
            {"data": {"datasets": [{"dataset_id": "ds_00000000"}]}, "eval": {"panel": ["hi"], "keep_best": True}},
            "eval.panel goes by evaluations: set data.eval_rows; eval.keep_best",
        ),
    ],
)
def test_what_is_not_in_the_table_is_refused_with_its_reason(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        spec_of(**change)
