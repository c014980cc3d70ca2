"""New tokens, end to end: learned beside every tuning, resumed bit for bit, and handed over as a model that any loader reads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.adapter import AdapterFacts, ParityRecord, tolerance
from core.catalog import REMOTE_CODE
from core.data.tokenizer import Tokenizer
from core.eval.logprobs import sequence_logprobs
from core.manifest import read_manifest
from core.models.load import Precision, load_base
from core.models.vocabulary import extend_vocabulary, install_rows, remove_rows
from core.plan import check_spec, plan
from core.plan.shape import model_shape, new_parameters, trainable_parameters
from core.prepare import prepare_tokens
from core.run import RunInput, TokenizeInput
from core.spec import JobSpec
from core.train.build import build_training
from core.train.loop import train
from core.train.tier import plain_attention
from core.train.training import count_parameters
from tests.core.train.runs import losses, run_input, spec_of, train_here
from tests.tiny import build_tiny_model

NEW = ["<tool>", "<tool>!", "海鸥号", "Zanzibar-7"]
PLACES = ["the sea", "the wind", "France", "the brown fox"]
DATA: dict[str, Any] = {"datasets": [{"dataset_id": "ds_00000000"}], "eval_rows": 4}
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8.0}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 5e-3}},
    "lora": {"tuning": LORA},
    "dora": {"tuning": LORA | {"dora": True}},
    "pissa": {"tuning": LORA | {"init": "pissa", "rslora": True, "rank_pattern": {"q_proj": 6}}},
    "mora": {"tuning": {"kind": "mora", "rank": 4}},
    "embeddings": {"tuning": LORA | {"train_embeddings": True}, "optim": {"learning_rate": 2e-3}},
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"vocab_size": 432},  # as many rows as tokens
    "untied": {"vocab_size": 432, "tie_word_embeddings": False},
    "spare": {"vocab_size": 512, "tie_word_embeddings": False},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build_tiny_model(tmp_path_factory.mktemp(name) / "model", **what) for name, what in MODELS.items()}


def write_rows(folder: Path, objective: str) -> Path:
    """Questions whose answer is one of the new tokens, another one for each."""
    lines = []
    for number in range(24):
        place, token, other = PLACES[number % 4], NEW[number % 4], NEW[(number + 1) % 4]
        prompt = [{"role": "user", "content": f"{number}: what is {place}?"}]
        answer = {"role": "assistant", "content": f"It is {token}"}
        row: dict[str, Any] = {"row": number + 1}
        if objective == "dpo":
            row |= {"prompt": prompt, "chosen": answer, "rejected": {"role": "assistant", "content": f"It is {other}"}}
        else:
            row |= {"messages": [*prompt, answer]}
        lines.append(json.dumps(row) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(lines))
    return path


def prepared(model: Path, work: Path, objective: str = "sft") -> Path:
    """The token cache that the preparer makes."""
    kind = "preference" if objective == "dpo" else "conversation"
    task = TokenizeInput(
        dataset_id="ds_00000000",
        rows=write_rows(work, objective),
        model_folder=model,
        template="model",
        max_length=128,
        data_kind=kind,
        train_on="all_turns",
        new_tokens=NEW,
    )
    prepare_tokens(task, work)
    return work / "tokens"


def job(tuning: str, **changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "optim": {"learning_rate": 1e-2},
        "data": DATA | {"new_tokens": NEW},
        "schedule": {"epochs": 20.0, "max_steps": 24, "warmup_steps": 2},
        "checkpoints": {"every_steps": 10},
    }
    return spec_of(**fields | TUNINGS[tuning] | changes)


class Watched:
    """A run in this process; `training` is what the loop built, `logits` and `rows` what it held when the last step was done."""

    def __init__(self, run: RunInput, run_dir: Path) -> None:
        def build(given: RunInput) -> Any:
            self.training = build_training(given)
            return self.training

        self.events = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("core.train.loop.build_training", build)
            for event in train(run, run_dir, lambda: False):
                self.events.append(event)
                if event.kind == "phase" and event.phase == "saving":
                    self.logits = logits_of(self.training.model)


def logits_of(model: Any, end: int = 436) -> torch.Tensor:
    """Of text with old and new tokens, and rows to spare up to `end`, in eval mode."""
    model.eval()
    with torch.no_grad(), plain_attention(model):
        return model(torch.tensor([[*range(3, 40), *range(428, end)]])).logits.clone()


def loaded(folder: Path, precision: Precision = "fp32") -> Any:
    return load_base(folder, name="t", weights="0" * 64, quantization="none", precision=precision, device=CPU).model


def extended(folder: Path) -> Any:
    """The base as it is before training, new tokens and all."""
    model = loaded(folder)
    extend_vocabulary(model, {token.id: token.pieces for token in Tokenizer.from_folder(folder, NEW).new})
    return model


def chance(model: Any, tokenizer: Tokenizer, number: int, token: str) -> float:
    """Log-probability of a new token behind a question that was trained on with it."""
    text = f"<|im_start|>user\n{number}: what is {PLACES[number]}?<|im_end|>\n<|im_start|>assistant\nIt is {token}"
    ids, _ = tokenizer.encode(text, parse_special=True)
    assert ids[-1] == tokenizer.token_id(token) >= 432
    return sequence_logprobs(model, ids, len(ids) - 1)[0]


CASES = [
    *[("full", name) for name in MODELS],
    *[("lora", name) for name in MODELS],
    *[("embeddings", name) for name in ("tied", "untied")],
    *[(tuning, "untied") for tuning in ("dora", "pissa", "mora")],
]


@pytest.mark.parametrize(("tuning", "name"), CASES)
def test_they_are_learned_resumed_and_reloaded(models: dict[str, Path], tmp_path: Path, tuning: str, name: str) -> None:
    model = models[name]
    cache = prepared(model, tmp_path / "work")
    run = Watched(run_input(model, cache, job(tuning)), tmp_path / "whole")
    resumed = run_input(model, cache, job(tuning), tmp_path / "whole" / "checkpoints" / "step-20")
    assert losses(train_here(resumed, tmp_path / "resumed")) == losses(run.events)[20:], "bit for bit"
    files = [read_manifest(tmp_path / name / "adapter")["files"] for name in ("whole", "resumed")]
    assert files[0] == files[1]

    folder = tmp_path / "whole" / "adapter"
    facts = AdapterFacts.model_validate(read_manifest(folder)["facts"])
    assert (facts.tuning, facts.rank, facts.base.weights) == ("full", None, "0" * 64)
    found, base, tokenizer = loaded(folder), extended(model), Tokenizer.from_folder(folder)
    assert (logits_of(found) - run.logits).abs().max() < 1e-4, "what was trained is what is written"
    for number, token in enumerate(NEW):
        assert chance(found, tokenizer, number, token) > chance(base, tokenizer, number, token) + 1, token
    for probe in ParityRecord.model_validate_json((folder / "parity.json").read_bytes()).probes:
        now = sequence_logprobs(found, probe.token_ids, probe.start)
        assert max(abs(a - b) for a, b in zip(now, probe.logprobs, strict=True)) < 1e-4
        assert len(probe.base_logprobs) == (len(now) if name == "spare" else 0), "only rows to spare can be asked"
    if tuning not in ("full", "embeddings"):
        for get in ("get_input_embeddings", "get_output_embeddings"):
            mine, old = (getattr(one, get)().weight for one in (found, base))
            assert torch.equal(mine[:432], old[:432]), "no other row moves"
            assert not torch.isclose(mine[432:436], old[432:436]).all(dim=1).any()
    assert found.config.vocab_size == max(436, MODELS[name]["vocab_size"])


FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    torch.save(model(torch.tensor([[*range(3, 40), *range(428, 436)]])).logits, out)
ids = tokenizer(text, add_special_tokens=False).input_ids
print(json.dumps([ids, tokenizer.decode(ids), len(tokenizer)]))
"""


@pytest.mark.parametrize(("tuning", "name"), [("full", "untied"), ("lora", "tied"), ("lora", "untied")])
def test_a_fresh_transformers_process_has_the_same_ids_and_logits(
    models: dict[str, Path], tmp_path: Path, tuning: str, name: str
) -> None:
    spec = job(tuning, memory={"precision": "bf16"}, schedule={"max_steps": 3})
    train_here(run_input(models[name], prepared(models[name], tmp_path), spec), tmp_path)
    folder = tmp_path / "adapter"
    text = "<|im_start|>a <tool> b<tool>!<tool>,海鸥号Zanzibar-7<|im_end|>"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), text, str(tmp_path / "logits.pt")], capture_output=True, check=True
    )
    ids, said, size = json.loads(done.stdout.splitlines()[-1])
    assert ids == Tokenizer.from_folder(folder).encode(text, parse_special=True)[0]
    assert (said, size) == (text, 436)
    again = loaded(folder, "bf16")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits_of(again))
    record = ParityRecord.model_validate_json((folder / "parity.json").read_bytes())
    assert record.compute_dtype == "bf16"
    for probe in record.probes:
        said = sequence_logprobs(again, probe.token_ids, probe.start)  # alone, where the record's sequences went in batches
        assert said == pytest.approx(probe.logprobs, abs=tolerance("bf16")), "measured on what is written"


def test_a_reference_model_has_the_new_tokens_too(models: dict[str, Path], tmp_path: Path) -> None:
    spec = job("lora", objective={"kind": "dpo", "beta": 0.5})
    run = Watched(run_input(models["tied"], prepared(models["tied"], tmp_path, "dpo"), spec), tmp_path)
    before, _ = (event for event in run.events if event.kind == "eval")
    assert before.eval_loss == pytest.approx(0.6931472, abs=1e-4), "nothing is won over the reference before training"
    assert min(losses(run.events)) < before.eval_loss - 0.05
    base = extended(models["tied"])
    for example in run.training.rows.eval_rows:
        for (ids, mask), reference in zip(example.sequences, example.reference, strict=True):
            logprobs = sequence_logprobs(base, ids.tolist(), 1)
            wanted = sum(value for value, trained in zip(logprobs, mask[1:], strict=True) if trained)
            assert reference == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_train_stand_in_for_the_models_own(tmp_path: Path, family: str, tied: bool) -> None:
    """Scaled lookups (Gemma) and a head with a bias (Phi) among them."""
    model = loaded(build_tiny_model(tmp_path / "model", family=family, vocab_size=440, tie_word_embeddings=tied))
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    extend_vocabulary(model, {token: (5, 9, token - 300) for token in range(432, 436)})
    before = logits_of(model, end=440)
    install_rows(model, 432, 4)
    again = logits_of(model, end=440)
    assert torch.equal(again[..., :432], before[..., :432])
    assert (again - before).abs().max() < 1e-5, "a product of other shape may round otherwise"
    rows = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [row.shape for row in rows] == [(4, 64)] * (1 if tied else 2)
    model(torch.tensor([[5, 433, 434, 7]])).logits.logsumexp(-1).sum().backward()
    if not tied:
        assert rows[0].grad.any(dim=1).tolist() == [False, True, True, False]
    assert all(row.grad.any() for row in rows)
    with torch.no_grad():
        for row in rows:
            row += torch.randn_like(row)
    moved = logits_of(model, end=440)
    assert not torch.allclose(moved, before)
    remove_rows(model)
    assert (logits_of(model, end=440) - moved).abs().max() < 1e-4
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({"NewRowsEmbedding", "NewRowsHead"})


@pytest.mark.parametrize("name", MODELS)
def test_a_new_row_begins_as_the_mean_of_its_pieces(models: dict[str, Path], name: str) -> None:
    base, longer, tokenizer = loaded(models[name]), extended(models[name]), Tokenizer.from_folder(models[name])
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, get)().weight for model in (base, longer))
        assert torch.equal(new[:432], old[:432])
        for token, text in enumerate(NEW, 432):
            pieces, _ = tokenizer.encode(text, parse_special=False)
            assert torch.allclose(new[token], sum(old[piece] for piece in pieces) / len(pieces), atol=1e-7)


@pytest.mark.parametrize("tuning", ["full", "lora", "embeddings", "mora"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_plan_counts_what_is_trained(models: dict[str, Path], tmp_path: Path, tuning: str, name: str) -> None:
    spec = job(tuning)
    training = build_training(run_input(models[name], prepared(models[name], tmp_path), spec))
    trainable, _ = count_parameters(training.model)
    config = json.loads((models[name] / "config.json").read_text())
    shape = model_shape("LlamaForCausalLM", config)
    parameters = sum(parameter.numel() for parameter in loaded(models[name]).parameters())
    assert trainable_parameters(spec, shape, parameters + new_parameters(spec, shape)) == trainable
    asked: dict[str, Any] = {"architecture": "LlamaForCausalLM", "config": config, "counts": None, "budget_gib": None}
    planned, without = (plan(one, parameters=parameters, **asked) for one in (spec, job(tuning, data=DATA)))
    assert planned.trainable_parameters == trainable
    assert planned.memory.total_gib > without.memory.total_gib


def test_a_model_with_its_own_code_takes_none() -> None:
    stored = {"hidden": 8, "intermediate": 8, "layers": 1, "vocabulary": 8, "linear": {"dense": [8, 8]}}
    problems = check_spec(job("lora"), architecture="ToyGLM", context_length=512, config={REMOTE_CODE: {"shape": stored}})
    assert [problem.pointer for problem in problems] == ["/data/new_tokens"]


def test_tokens_that_stand_in_no_row_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    cache = prepared(models["tied"], tmp_path)
    warned = build_training(run_input(models["tied"], cache, job("lora", data=DATA | {"new_tokens": [*NEW, "tpyo-1", "tpyo-2"]})))
    assert [(warning.code, warning.message.partition(": ")[2]) for warning in warned.warnings] == [
        ("new_tokens_unused", "no row holds 'tpyo-1', 'tpyo-2': nothing is learned about them")
    ]
    assert build_training(run_input(models["tied"], cache, job("lora"))).warnings == []
