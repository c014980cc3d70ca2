"""POST /generate and GET /v1/models over real HTTP."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from store.adapters import CHANNEL
from tests.lora import fresh_answer
from tests.serving.conftest import Service, running, wait_for


def test_ids_and_logprobs_over_http_equal_those_of_a_fresh_process(service: Service) -> None:
    published = service.publish(1)
    service.deploy(published)
    service.wait_routable("pirate")
    answer = service.ask("pirate", return_token_ids=True, logprobs=True).json()
    base = AutoModelForCausalLM.from_pretrained(service.model, dtype=torch.float32).eval()
    ids, logprobs = fresh_answer(PeftModel.from_pretrained(base, str(published.folder)).eval(), answer["prompt_token_ids"], 16)
    assert answer["token_ids"] == ids
    assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-5)
    assert answer["model"] == "pirate@1"
    assert answer["usage"] == {
        "prompt_tokens": len(answer["prompt_token_ids"]),
        "completion_tokens": 16,
        "total_tokens": len(answer["prompt_token_ids"]) + 16,
    }
    assert answer["finish_reason"] == "length"


def test_a_stream_says_what_the_whole_answer_says(service: Service) -> None:
    options = {"temperature": 1.4, "seed": 5, "max_tokens": 40, "return_token_ids": True, "logprobs": True}
    whole = service.ask("tiny", **options).json()
    chunks, last = service.stream("tiny", **options)
    assert last == "[DONE]"
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [number for chunk in chunks for number in chunk["token_ids"] or []] == whole["token_ids"]
    assert [number for chunk in chunks for number in chunk["logprobs"] or []] == pytest.approx(whole["logprobs"], abs=1e-5)
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["finish_reason"]]
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_only_what_was_asked_for_is_told(service: Service) -> None:
    assert set(service.ask("tiny").json()) == {"id", "object", "created", "model", "text", "finish_reason", "usage"}


def test_a_prompt_is_read_as_it_is_and_equals_the_rendered_messages(service: Service) -> None:
    rendered = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    by_prompt = service.ask("tiny", prompt=rendered, return_token_ids=True).json()
    by_messages = service.ask("tiny", return_token_ids=True).json()
    assert by_prompt["token_ids"] == by_messages["token_ids"]
    assert by_prompt["prompt_token_ids"] == by_messages["prompt_token_ids"]


def test_a_stop_string_ends_the_answer_before_it(service: Service) -> None:
    text = service.ask("tiny", max_tokens=40).json()["text"]
    stop = text[8:12]
    chunks, _ = service.stream("tiny", max_tokens=40, stop=[stop, "never there"])
    answer = service.ask("tiny", max_tokens=40, stop=stop).json()
    assert answer["text"] == text[: text.index(stop)] == "".join(chunk["text"] for chunk in chunks)
    assert answer["finish_reason"] == "stop" == chunks[-1]["finish_reason"]


def test_a_seed_is_reproduced_beside_other_requests(service: Service) -> None:
    options = {"temperature": 1.0, "seed": 11}
    first = service.ask("tiny", **options).json()["text"]
    assert service.ask("tiny", temperature=1.0).json()["text"] != first
    assert service.ask("tiny", **options).json()["text"] == first


@pytest.fixture
def held(service: Service) -> Iterator[threading.Event]:
    """The engine stands still, between two tokens or before the first, until the event is set."""
    release, standing = threading.Event(), threading.Event()

    def hold() -> None:
        standing.set()
        release.wait(30)

    holder = threading.Thread(target=lambda: service.app.state.serving.engine.call(hold))
    holder.start()
    standing.wait(10)
    yield release
    release.set()
    holder.join()


def test_a_client_that_leaves_before_its_answer_cancels_it(service: Service, held: threading.Event) -> None:
    engine = service.app.state.serving.engine
    body = {"model": "tiny", "prompt": "a", "temperature": 1.0, "max_tokens": 500}
    with pytest.raises(httpx.ReadTimeout):
        service.client.post("/generate", json=body, headers=service.bearer(), timeout=httpx.Timeout(10, read=0.5))
    (ticket,) = engine._open
    wait_for(lambda: ticket.is_cancelled, seconds=5)
    held.set()
    wait_for(lambda: engine.load == 0, seconds=5)


def test_leaving_in_mid_stream_cancels_the_rest(service: Service) -> None:
    engine, base = service.app.state.serving.engine, service.app.state.serving.directory.bases[0]
    base.stop_ids = ()
    release, standing = threading.Event(), threading.Event()
    passes = 0

    def stand_still(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 20:
            standing.set()
            release.wait(30)

    hook = base.host.model.register_forward_pre_hook(stand_still)
    body = {"model": "tiny", "prompt": "a", "temperature": 1.0, "max_tokens": 500, "stream": True}
    try:
        with service.client.stream("POST", "/generate", json=body, headers=service.bearer()) as response:
            next(response.iter_lines())
            assert standing.wait(10)
            (ticket,) = engine._open
        wait_for(lambda: ticket.is_cancelled, seconds=5)
    finally:
        release.set()
        hook.remove()
    wait_for(lambda: engine.load == 0, seconds=5)
    assert passes <= 21


def test_too_many_waiting_requests_are_told_to_come_back(service: Service) -> None:
    engine = service.app.state.serving.engine
    engine._max_waiting = 0
    response = service.ask("tiny")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"


def test_readiness_is_red_until_the_bases_are_loaded(prepared: Service) -> None:
    with running(prepared) as service:
        follower = service.app.state.serving.follower
        assert service.client.get("/readyz").json() == {"status": "ready"}
        assert service.client.get("/healthz").json() == {"status": "ok"}
        follower.problem = "the bases are being loaded"
        red = service.client.get("/readyz")
        assert red.status_code == 503
        assert "being loaded" in red.json()["error"]["message"]
        assert int(red.headers["retry-after"]) > 0


def test_the_channel_is_the_one_deployments_are_announced_on(service: Service) -> None:
    published = service.publish(1)
    begun = time.monotonic()
    service.deploy(published)
    service.wait_routable("pirate")  # the endpoint's own look comes only every ten minutes in this test
    assert CHANNEL == "strop_deployments"
    assert time.monotonic() - begun < service.settings.poll_seconds


def test_the_pages_of_documentation_need_no_network(service: Service) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    schema = service.client.get("/openapi.json").json()
    operation: dict[str, Any] = schema["paths"]["/generate"]["post"]
    assert {"200", "400", "401", "403", "404", "413", "429", "500", "503"} <= set(operation["responses"])
    assert json.dumps(operation["responses"]["400"]).count("ErrorBody")
