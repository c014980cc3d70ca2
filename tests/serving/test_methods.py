"""Whatever the engine can train, the endpoint serves: every tuning and objective of docs/methods.md, trained, deployed, asked."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.adapter import AdapterFacts
from core.data.tokenizer import Tokenizer
from core.manifest import read_manifest
from core.model_folder import read_model_facts
from core.models.adapt import load_adapter
from core.models.load import load_base, quantization_name
from core.spec import FullTuning, JobSpec
from store.models import register_model
from tests.core.train.runs import random_pairs, random_rows, run_input, spec_of, train_here, write_cache
from tests.core.train.test_methods import CASES, OBJECTIVES, TUNINGS
from tests.serving.conftest import Service, running
from tests.tiny import build_tiny_model

BASES = ("tiny:fp32", "tiny:nf4:fp32", "tiny:nf4-double:fp32", "tiny:fp4-double:fp32", "tiny:int8:fp32", "tiny:fp8:fp32")
TOKENS = 8


def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities by the definition: the whole sequence anew for every token, no cache."""
    answer: list[int] = []
    logprobs: list[float] = []
    with torch.no_grad():
        for _ in range(TOKENS):
            table = torch.log_softmax(model(torch.tensor([ids + answer])).logits[0, -1].float(), -1)
            answer.append(int(table.argmax()))
            logprobs.append(float(table[answer[-1]]))
    return answer, logprobs


def loaded(service: Service, spec: JobSpec, folder: Path) -> Any:
    options: dict[str, Any] = {"name": "t", "weights": "0" * 64, "precision": "fp32", "device": torch.device("cpu")}
    if isinstance(spec.tuning, FullTuning):
        return load_base(folder, quantization="none", **options).model
    base = load_base(service.model, quantization=quantization_name(spec.quantization), **options)
    return load_adapter(base.model, folder, "reference").eval()


def test_every_method_answers_as_it_was_trained(prepared: Service, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    caches = {
        "sft": write_cache(tmp_path / "rows", random_rows(40)),
        "plain_text": write_cache(tmp_path / "texts", [(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in random_rows(40)]),
        "preference": write_cache(tmp_path / "pairs", random_pairs(28), group=2),
    }
    prepared.settings = prepared.settings.model_copy(update={"bases": BASES, "poll_seconds": 0.5})
    text = "The capital of France"
    prompt, _ = Tokenizer.from_folder(prepared.model).encode(text, parse_special=True)
    expected: dict[str, tuple[list[int], list[float]]] = {}
    for tuning, objective in CASES:
        spec = spec_of(
            **{"optim": {"learning_rate": 5e-3}, **TUNINGS[tuning]},
            objective=OBJECTIVES[objective],
            schedule={"max_steps": 6},
            checkpoints={"every_steps": None},
        )
        name = f"{tuning}-{objective}".replace("_", "-")
        run = run_input(prepared.model, caches.get(objective, caches["preference"]), spec)
        train_here(run.model_copy(update={"model_weights": prepared.weights}), tmp_path / name)
        folder = tmp_path / name / "adapter"
        facts = AdapterFacts.model_validate(read_manifest(folder)["facts"])
        expected[name] = greedy(loaded(prepared, spec, folder), prompt)
        prepared.deploy(prepared.publish_result(folder, facts, name=name))
    with running(prepared):
        options = {"prompt": text, "max_tokens": TOKENS, "return_token_ids": True, "logprobs": True}
        base = prepared.ask("tiny", **options).json()["logprobs"]
        for name, (ids, logprobs) in expected.items():
            prepared.wait_routable(name)
            given = prepared.ask(name, **options).json()
            count = len(given["token_ids"])  # fewer where the model says it is done
            assert (given["model"], given["token_ids"]) == (f"{name}@1", ids[:count])
            # LLM.int8 picks its outlier columns over all tokens at hand, and fp8 rounds what sums of other sizes differ in: both
            # depend a little on what is computed together.
            within = 2e-2 if name.startswith(("int8", "fp8")) else 1e-3
            assert given["logprobs"] == pytest.approx(logprobs[:count], abs=within), name
            assert given["logprobs"][0] != pytest.approx(base[0], abs=1e-4), f"{name} answers as the bare base does"


def test_a_model_with_new_tokens_is_asked_in_its_own_vocabulary(prepared: Service, tmp_path: Path) -> None:
    """Its base has no rows for them, and goes on beside it as it was."""
    torch.set_num_threads(1)
    small = build_tiny_model(prepared.model.parent / "small", vocab_size=432, tie_word_embeddings=False)
    facts = read_model_facts(small)
    with prepared.database.transaction() as session:
        register_model(session, "small", small.name, facts)
    prepared.settings = prepared.settings.model_copy(update={"bases": ("small:fp32",), "poll_seconds": 0.5})
    text = "The <tool> of <tool>!"
    asked = Tokenizer.from_folder(small, ["<tool>"]).encode(text, parse_special=True)[0]
    assert asked.count(432) == 2
    rows = [([*ids[:-2], 432, 2], mask) for ids, mask in random_rows(40)]
    data = {"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 6, "new_tokens": ["<tool>"]}
    published = {}
    for name, told in (("always", rows), ("sometimes", rows[:20] + random_rows(40)[20:])):
        run = run_input(small, write_cache(tmp_path / name / "rows", told), spec_of(data=data, schedule={"max_steps": 6}))
        train_here(run.model_copy(update={"model_weights": facts.weights}), tmp_path / name)
        folder = tmp_path / name / "adapter"
        result = AdapterFacts.model_validate(read_manifest(folder)["facts"])
        assert result.tuning == "full"
        published[name] = prepared.publish_result(folder, result, name=name)
        prepared.deploy(published[name])
    with running(prepared):
        for name, version in published.items():
            prepared.wait_routable(name)
            ids, logprobs = greedy(loaded(prepared, spec_of(tuning={"kind": "full"}), version.folder), asked)
            given = prepared.ask(name, prompt=text, max_tokens=TOKENS, return_token_ids=True, logprobs=True).json()
            count = len(given["token_ids"])
            assert given["token_ids"] == ids[:count]
            assert given["logprobs"] == pytest.approx(logprobs[:count], abs=1e-3)
            assert given["usage"]["prompt_tokens"] == len(asked)
            # Where every probe holds a new token there is nothing to compare with the base's answers.
            checks = {receipt.check for receipt in prepared.receipts(version)}
            assert ("parity" in checks, "effect" in checks) == (True, name == "sometimes")
        base = prepared.ask("small", prompt=text, max_tokens=1).json()
        assert base["usage"]["prompt_tokens"] > len(asked)
