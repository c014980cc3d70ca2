"""The whole walk over real HTTP, Celery, Redis, Postgres and child processes: upload, train, watch, deploy, ask, compare."""

import json
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest

from standalone.stack import Stack
from tests.e2e.conftest import tiny_spec
from tests.e2e.service import Service

TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"quantization": {"kind": "nf4"}},
    "full": {"tuning": {"kind": "full"}, "optim": {"learning_rate": 0.003}},
}

FRESH_PROCESS = """
# Only transformers, peft and what was downloaded: ids and log-probabilities of a greedy answer.
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

archive, base, tuning, prompt, count = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(archive)
if tuning == "full":
    model = AutoModelForCausalLM.from_pretrained(archive, dtype=torch.float32)
else:
    from peft import PeftModel

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=nf4 if tuning == "qlora" else None
    )
    model = PeftModel.from_pretrained(model, archive)
    # On CPUs with AVX512-BF16, bitsandbytes answers from weights repacked for bf16 products, whatever the compute dtype says.
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
model.eval()
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)["input_ids"]
answer, logprobs = [], []
with torch.no_grad():
    for _ in range(int(count)):
        distribution = torch.log_softmax(model(ids).logits[0, -1].float(), -1)
        token = int(distribution.argmax())
        answer.append(token)
        logprobs.append(float(distribution[token]))
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
print(json.dumps({"ids": answer, "logprobs": logprobs}))
"""


@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_is_served_is_what_was_trained(
    tuning: str, service: Service, dataset_id: str, tiny_model: Path, tmp_path: Path
) -> None:
    job = service.submit(tiny_spec(dataset_id, adapter_name=f"walk-{tuning}", **TUNINGS[tuning]))
    live = list(service.live_metrics(job["id"]))
    job = service.ended_job(job["id"])
    assert job["status"] == "succeeded", job
    steps = [data for event, _, data in live if event == "step"]
    assert [data["step"] for data in steps] == list(range(1, job["total_steps"] + 1))
    assert live[-1][0] == "status"
    assert steps[-1]["loss"] < steps[0]["loss"]
    before, after = (e["data"] for e in service.events(job["id"]) if e["kind"] == "eval")
    assert after["eval_loss"] < before["eval_loss"] - 0.05
    assert len(after["row_losses"]) == 8

    name = service.deploy(job["adapter_id"])
    prompt = "Add 5 and 8."
    answer = service.generate(name, prompt, logprobs=True, return_token_ids=True)
    base = service.generate("tiny", prompt, return_token_ids=True)
    assert answer["token_ids"] != base["token_ids"]

    archive = tmp_path / "archive"
    with tarfile.open(fileobj=BytesIO(service.download(job["adapter_id"]))) as tar:
        tar.extractall(archive, filter="data")
    [folder] = {path.parent for path in archive.rglob("manifest.json")}
    program = [sys.executable, "-W", "ignore", "-c", FRESH_PROCESS, str(folder), str(tiny_model), tuning, prompt, "24"]
    fresh = json.loads(subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    assert answer["token_ids"] == fresh["ids"]
    assert answer["logprobs"] == pytest.approx(fresh["logprobs"], abs=1e-4)


def test_no_control_plane_or_celery_process_maps_libtorch(stack: Stack, service: Service, dataset_id: str) -> None:
    """After a job of each kind of work has gone through them."""
    job = service.submit(tiny_spec(dataset_id, schedule={"kind": "constant", "max_steps": 2}))
    assert service.ended_job(job["id"])["status"] == "succeeded"
    looked_at = []
    for name in ("api", "worker", "preparer"):
        parent = psutil.Process(stack.processes[name].pid)
        for process in [parent, *parent.children(recursive=True)]:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtorch" not in maps, f"{name}: {process.cmdline()}"
            looked_at.append(name)
    assert set(looked_at) == {"api", "worker", "preparer"}
    assert "libtorch" in Path(f"/proc/{stack.processes['serving'].pid}/maps").read_text()  # the check can see one


def test_the_same_idempotency_key_gives_the_same_job(service: Service, dataset_id: str) -> None:
    spec = tiny_spec(dataset_id, schedule={"kind": "constant", "max_steps": 1})
    first = service.submit(spec, **{"Idempotency-Key": "walk-1"})
    again = service.submit(spec, **{"Idempotency-Key": "walk-1"})
    assert first["id"] == again["id"]
    assert service.ended_job(first["id"])["status"] == "succeeded"


def test_what_was_planned_is_what_ran(service: Service, dataset_id: str) -> None:
    spec = tiny_spec(dataset_id, schedule={"kind": "cosine", "epochs": 1.5})
    job = service.ended_job(service.submit(spec)["id"])
    plan = service.api.post("/jobs/plan", json=spec).json()
    assert plan["ready"]
    assert plan["steps"] == job["total_steps"] == job["step"]
    started = next(e["data"] for e in service.events(job["id"]) if e["kind"] == "started")
    assert (plan["train_rows"], plan["eval_rows"]) == (started["train_rows"], started["eval_rows"])
    assert plan["trainable_parameters"] == started["trainable_parameters"]


def test_a_job_on_a_dataset_that_is_still_read_waits_for_it(service: Service, dataset_file: Path) -> None:
    dataset_id = service.upload(dataset_file)["id"]
    job = service.submit(tiny_spec(dataset_id, schedule={"kind": "constant", "max_steps": 1}))
    assert service.ended_job(job["id"])["status"] == "succeeded"


def test_rows_without_a_trained_token_end_the_job_before_a_gpu_is_asked(service: Service, dataset_id: str) -> None:
    job = service.submit(tiny_spec(dataset_id, data={"datasets": [{"dataset_id": dataset_id}], "max_length": 8}))
    ended = service.ended_job(job["id"])
    assert (ended["status"], ended["reason"], ended["runs"]) == ("failed", "no_trainable_tokens", [])


def test_a_job_that_diverges_stops_and_says_why(service: Service, dataset_id: str) -> None:
    ended = service.ended_job(service.submit(tiny_spec(dataset_id, base_model="poisoned"))["id"])
    assert (ended["status"], ended["reason"]) == ("failed", "numerical_divergence")
    assert ended["adapter_id"] is None


def test_what_the_device_lacks_is_said_with_its_field(service: Service, dataset_id: str) -> None:
    """Whether a worker has a GPU is known only there; this one has none."""
    ended = service.ended_job(service.submit(tiny_spec(dataset_id, memory={"precision": "fp16"}))["id"])
    assert (ended["status"], ended["reason"]) == ("failed", "bad_spec")
    assert "memory.precision" in ended["message"]
    assert len(ended["runs"]) == 1  # a spec does not get better by trying again


OTHER_OBJECTIVES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "dpo": (
        {"kind": "dpo", "beta": 0.5},
        [{"prompt": f"Add {n} and 3.", "chosen": f"The sum is {n + 3}.", "rejected": f"I don't know {n}."} for n in range(40)],
    ),
    "orpo": (
        {"kind": "orpo"},
        [{"prompt": f"Add {n} and 4.", "chosen": f"The sum is {n + 4}.", "rejected": f"No idea about {n}."} for n in range(40)],
    ),
    "plain_text": ({"kind": "plain_text"}, [{"text": f"Adding {n} and 5 gives {n + 5}. " * 6} for n in range(40)]),
}


@pytest.mark.parametrize("objective", OTHER_OBJECTIVES)
def test_preferences_and_texts_walk_the_same_way(objective: str, service: Service, dataset_id: str, tmp_path: Path) -> None:
    chosen, rows = OTHER_OBJECTIVES[objective]
    path = tmp_path / f"{objective}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = service.ready_dataset(path)
    spec = tiny_spec(own, objective=chosen, adapter_name=f"walk-{objective.replace('_', '-')}")
    planned = service.api.post("/jobs/plan", json=spec | {"data": {"datasets": [{"dataset_id": dataset_id}]}})
    assert planned.status_code == 422, "conversations are not what this objective trains on"
    assert planned.json()["errors"][0]["pointer"] == "/data/datasets/0/dataset_id"
    job = service.ended_job(service.submit(spec)["id"])
    assert job["status"] == "succeeded", job
    plan = service.api.post("/jobs/plan", json=spec).json()
    assert (plan["ready"], plan["steps"]) == (True, job["total_steps"])
    before, after = (e["data"] for e in service.events(job["id"]) if e["kind"] == "eval")
    assert after["eval_loss"] < before["eval_loss"]
    curves = {name for point in service.metrics(job["id"]) for name, value in point.items() if value is not None}
    assert ("reward_margin" in curves) == (objective != "plain_text")
    name = service.deploy(job["adapter_id"])
    assert service.generate(name, "Add 5 and 8.")["usage"]["completion_tokens"] > 0


def test_new_tokens_make_a_whole_model_that_is_asked_with_them(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    rows = [{"prompt": f"<sum> {n} and 6", "completion": f"<sum> {n + 6}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"datasets": [{"dataset_id": service.ready_dataset(path)}], "eval_rows": 4, "max_length": 128}
    spec = tiny_spec("", data=data | {"new_tokens": ["<sum>"]}, adapter_name="walk-tokens")
    job = service.ended_job(service.submit(spec)["id"])
    assert job["status"] == "succeeded", job
    started = next(event["data"] for event in service.events(job["id"]) if event["kind"] == "started")
    plan = service.api.post("/jobs/plan", json=spec).json()
    assert (plan["ready"], plan["trainable_parameters"]) == (True, started["trainable_parameters"])
    plain = service.api.post("/jobs/plan", json=spec | {"data": data}).json()
    assert plan["trainable_parameters"] == plain["trainable_parameters"] + 64
    assert service.api.get(f"/adapters/{job['adapter_id']}").json()["versions"][0]["tuning"] == "full"
    answers = [service.generate(name, "<sum> 5 and 6") for name in (service.deploy(job["adapter_id"]), "tiny")]
    with_token, without = (answer["usage"]["prompt_tokens"] for answer in answers)
    assert with_token < without

    refused = service.ended_job(service.submit(spec | {"data": data | {"new_tokens": ["<|im_end|>"]}})["id"])
    assert (refused["status"], refused["reason"], refused["runs"]) == ("failed", "bad_spec", [])
    assert refused["message"] == "data.new_tokens: '<|im_end|>' is a special token"


def test_a_run_that_stops_early_says_so_and_hands_over_its_best(service: Service, dataset_id: str) -> None:
    watched = {
        "every_steps": 2,
        "generation": {"rows": 2, "max_tokens": 4},
        "panel": ["Add 1 and 2."],
        "panel_max_tokens": 4,
        "keep_best": True,
        "early_stopping": {"patience": 1, "min_delta": 100.0},
    }
    job = service.ended_job(service.submit(tiny_spec(dataset_id, eval=watched))["id"])
    assert (job["status"], job["reason"]) == ("succeeded", "finished")
    assert "stopped early, after step 2" in job["message"]
    answers = [e["data"] for e in service.events(job["id"]) if e["kind"] == "answers"]
    assert [(a["step"], a["source"], len(a["answers"])) for a in answers] == [
        *((0, "held_out", 2), (0, "panel", 1)),
        *((2, "held_out", 2), (2, "panel", 1)),
    ]
    assert all("eval_bleu" in point for point in service.metrics(job["id"]) if "eval_loss" in point)
