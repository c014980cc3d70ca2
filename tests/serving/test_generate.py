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

from core.infer.runner import PAGE
from store.adapters import CHANNEL
from store.keys import create_key
from store.tables import DEFAULT_PROJECT
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
        "prompt_tokens_details": {"cached_tokens": 0},
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
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
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


def test_the_extra_settings_reach_the_sampler(service: Service) -> None:
    service.app.state.serving.directory.bases[0].stop_ids = ()
    plain = service.ask("tiny", return_token_ids=True).json()
    forced = service.ask("tiny", return_token_ids=True, logit_bias={"40": 100}).json()
    assert forced["token_ids"] == [40] * 16
    assert service.ask("tiny", temperature=2, top_k=1, seed=1).json()["text"] == plain["text"]
    assert service.ask("tiny", temperature=2, min_p=1, seed=1).json()["text"] == plain["text"]
    kept = service.ask("tiny", return_token_ids=True, logit_bias={"40": 100}, frequency_penalty=2, presence_penalty=2).json()
    assert kept["token_ids"] == [40] * 16  # 100 outweighs 2 and 2 a token
    spread = service.ask("tiny", return_token_ids=True, repetition_penalty=10.0).json()["token_ids"]
    assert len(set(spread)) == len(spread)
    ended = service.ask("tiny", return_token_ids=True, stop_token_ids=[plain["token_ids"][3]]).json()
    assert ended["token_ids"] == plain["token_ids"][: plain["token_ids"].index(plain["token_ids"][3]) + 1]
    assert ended["finish_reason"] == "stop"
    assert service.ask("tiny", top_k=None, stop=None).json()["text"] == plain["text"]


def test_inputs_and_parameters_are_answered_in_their_own_shape(service: Service) -> None:
    published = service.publish(1)
    service.deploy(published)
    service.wait_routable("pirate")

    def ask(**body: Any) -> dict[str, Any]:
        response = service.client.post("/generate", json=body, headers=service.bearer())
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    text = "What is the capital of France?"
    for parameters, model in (({}, "tiny"), ({"adapter_id": "pirate"}, "pirate@1"), ({"model": "pirate@1"}, "pirate@1")):
        native = service.ask(model, prompt=text, max_tokens=8, return_token_ids=True, logprobs=True).json()
        answer = ask(inputs=text, parameters={"max_new_tokens": 8, **parameters})
        assert answer == {"generated_text": native["text"], "model": model}
        details = ask(inputs=text, parameters={"max_new_tokens": 8, "details": True, **parameters})["details"]
        assert [token["id"] for token in details["tokens"]] == native["token_ids"]
        assert [token["logprob"] for token in details["tokens"]] == native["logprobs"]
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 8)
    whole = ask(inputs=text, parameters={"max_new_tokens": 8, "return_full_text": True})["generated_text"]
    assert whole.startswith(text)
    drawn = service.ask("tiny", prompt=text, max_tokens=8, temperature=1.5, top_p=0.9, seed=3).json()["text"]
    asked = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    assert ask(inputs=text, parameters=asked)["generated_text"] == drawn


def test_metrics_tell_each_model_apart_and_forget_what_is_served_no_longer(service: Service) -> None:
    with service.database.transaction() as session:
        _, collector = create_key(session, service.settings.pepper, DEFAULT_PROJECT, name="m", scopes=["metrics:read"])

    def numbers() -> dict[str, float]:
        response = service.client.get("/metrics", headers=service.bearer(collector))
        assert response.headers["content-type"].startswith("text/plain")
        lines = [line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines if "_created" not in name}

    assert service.client.get("/metrics", headers=service.bearer()).status_code == 403
    published = service.publish(1)
    service.deploy(published)
    service.wait_routable("pirate")
    service.app.state.serving.directory.bases[0].stop_ids = ()
    first, second = (service.ask("tiny", max_tokens=5).json()["usage"] for _ in range(2))
    prompt = first["prompt_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == (prompt - 1) // PAGE * PAGE > 0
    service.ask("pirate", max_tokens=3)
    service.app.state.serving.engine._max_waiting, before = 0, service.app.state.serving.engine._max_waiting
    service.ask("pirate@1")
    service.ask("absent")
    service.app.state.serving.engine._max_waiting = before
    found = numbers()
    base, adapter = '{model="tiny",project=""}', f'{{model="pirate@1",project="{DEFAULT_PROJECT}"}}'
    assert found[f"strop_serving_prompt_tokens_total{base}"] == 2 * prompt
    assert found[f"strop_serving_cached_prompt_tokens_total{base}"] == second["prompt_tokens_details"]["cached_tokens"]
    assert found[f"strop_serving_generated_tokens_total{base}"] == 10
    assert found[f"strop_serving_first_token_seconds_count{base}"] == 2
    assert found[f"strop_serving_inter_token_seconds_count{base}"] == 8
    assert found[f"strop_serving_waiting{base}"] == found[f"strop_serving_running{base}"] == 0
    assert found['strop_serving_requests_total{model="tiny",outcome="length",project=""}'] == 2
    assert 0 < found[f"strop_serving_generated_tokens_total{adapter}"] <= 3
    assert found[f'strop_serving_requests_total{{model="pirate@1",outcome="queue_full",project="{DEFAULT_PROJECT}"}}'] == 1
    assert not any("absent" in name for name in found)
    service.undeploy(published)
    wait_for(lambda: "pirate" not in service.models())
    assert {name for name in numbers() if "pirate" in name} == set()
    assert numbers()[f"strop_serving_generated_tokens_total{base}"] == 10


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
            lines = response.iter_lines()  # kept: its end closes the connection
            next(lines)
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
    for path in ("/generate", "/v1/chat/completions"):
        operation: dict[str, Any] = schema["paths"][path]["post"]
        assert {"200", "400", "401", "403", "404", "413", "429", "500", "503"} <= set(operation["responses"])
        assert json.dumps(operation["responses"]["400"]).count("ErrorBody")
