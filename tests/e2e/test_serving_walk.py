"""From training to serving under load, as an operator and OpenAI's own client see it: adapters come, are replaced and are
brought from elsewhere while others are being asked.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from standalone.stack import Stack
from tests.e2e.conftest import tiny_spec
from tests.e2e.service import Service
from tests.lora import add_lora, fresh_answer

TOKENS = 300
QUESTION: list[Any] = [{"role": "user", "content": "Add 5 and 8."}]
GREEDY: dict[str, Any] = {
    "messages": QUESTION,
    "max_tokens": TOKENS,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=stack.api_key, base_url=f"{stack.serving_url}/v1", max_retries=0) as client:
        yield client


@dataclass(frozen=True)
class Streamed:
    asked: str
    models: set[str]
    text: str


def stream(client: openai.OpenAI, model: str, begun: threading.Barrier | None = None) -> Streamed:
    models, text = set(), ""
    for number, chunk in enumerate(client.chat.completions.create(model=model, stream=True, **GREEDY)):
        if number == 0 and begun is not None:
            begun.wait(30)
        models.add(chunk.model)
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return Streamed(model, models, text)


def whole(client: openai.OpenAI, model: str) -> str:
    return client.chat.completions.create(model=model, **GREEDY).choices[0].message.content or ""


def test_adapters_are_trained_deployed_replaced_and_imported_under_load(
    service: Service, stack: Stack, client: openai.OpenAI, dataset_id: str, tiny_model: Path, tmp_path: Path
) -> None:
    def train(name: str, **fields: Any) -> str:
        job = service.ended_job(service.submit(tiny_spec(dataset_id, adapter_name=name, **fields))["id"])
        assert job["status"] == "succeeded", job
        return str(job["adapter_id"])

    plain = train("load-plain")
    service.deploy(plain)
    service.deploy(train("load-dora", tuning={"kind": "lora", "rank": 4, "alpha": 8, "dora": True}, seed=8))
    expected = {name: whole(client, name) for name in ("tiny", "load-plain@1", "load-dora@1")}
    assert len(set(expected.values())) == 3

    # The second version is trained while others are asked.
    answers: list[Streamed] = []
    is_over = threading.Event()

    def keep_asking(model: str) -> None:
        while not is_over.is_set():
            answers.append(stream(client, model))

    begun = threading.Barrier(4)
    with ThreadPoolExecutor(6) as pool:
        try:
            asking = [pool.submit(keep_asking, model) for model in ("load-plain", "load-dora", "tiny")]
            assert train("load-plain", seed=9, schedule={"kind": "linear", "epochs": 3}) == plain
            long = [pool.submit(stream, client, "load-plain", begun) for _ in range(3)]
            begun.wait(30)
            service.deploy(plain)
            expected["load-plain@2"] = whole(client, "load-plain@2")
            service.undeploy(plain, 1)
        finally:
            is_over.set()
    for one in asking:
        one.result()
    answers += [one.result() for one in long]
    assert len(set(expected.values())) == 4
    for one in answers:
        (named,) = one.models
        assert named.partition("@")[0] == one.asked
        assert one.text == expected[named]
    assert {"load-plain@1"} in [one.models for one in answers]
    assert stream(client, "load-plain").models == {"load-plain@2"}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="load-plain@1", **GREEDY)

    folder = add_lora(tiny_model, tmp_path / "elsewhere", seed=3)
    base = ["--base", "tiny", "--precision", "fp32", "--device", "cpu"]
    stack.run_setup("-m", "store.admin", "adapters", "import", str(folder), "--name", "load-guest", *base)
    adapters = service.api.get("/adapters").json()["data"]
    (guest,) = [adapter["id"] for adapter in adapters if adapter["name"] == "load-guest"]
    service.deploy(guest)
    answer = service.generate("load-guest", "Add 5 and 8.", return_token_ids=True, ignore_eos=True)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), str(folder))
    peft.generation_config.eos_token_id = None
    assert answer["token_ids"] == fresh_answer(peft.eval(), answer["prompt_token_ids"], 24)[0]
