"""Versions of one name come and go under load, the prefix cache on: no answer is another version's, and none is a version's
that had not come yet or was gone.

Each version is trained to answer with its own number, and every answer is held to what a fresh peft says: a page of keys and
values that outlived its version, a name that means yesterday's weights, or a request lost between two versions shows here.
"""

import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from core.data.conversation import Message
from core.data.render import render_prompt
from core.data.template import choose_template
from core.data.tokenizer import Tokenizer
from store.tables import DEFAULT_PROJECT
from tests.lora import fresh_answer, teach_lora
from tests.serving.conftest import Published, Service, wait_for

SOAK = bool(os.environ.get("STROP_SOAK"))
FLIPS, REQUESTS = (100, 10_000) if SOAK else (8, 300)
CLIENTS = 8
TOKENS = 16
SHARED = "The quick brown fox jumps over the lazy dog. Give three tips for staying healthy. " * 12
PROBES = [SHARED + question for question in ("Which version are you?", "Say it again.", "And your number?", "Who answers?")]


@dataclass
class Life:
    """When a version can have been served, and when it was for certain: on both sides of each deploy and undeploy."""

    possible: list[list[float]] = field(default_factory=list)
    certain: list[list[float]] = field(default_factory=list)

    def may_answer(self, begin: float, end: float) -> bool:
        return any(first <= end and begin <= last for first, last in self.possible)

    def must_answer(self, begin: float, end: float) -> bool:
        return any(first <= begin and end <= last for first, last in self.certain)


class Versions:
    """Published versions of one name, each with what it answers; and the lives they have led."""

    def __init__(self, service: Service, name: str) -> None:
        self.service = service
        self.name = name
        self.tokenizer = Tokenizer.from_folder(service.model)
        template = choose_template("model", self.tokenizer)
        self.prompts = [render_prompt([Message("user", probe)], self.tokenizer, template) for probe in PROBES]
        self.published: list[Published] = []
        self.expected: dict[str, list[list[int]]] = {"tiny": self._reference(None)}
        self.lives: dict[int, Life] = {}

    def publish(self, **options: Any) -> Published:
        """The next version, whose answer to each probe begins with its own number."""
        number = len(self.published) + 1
        own = self.tokenizer.encode(f"I am version {number}.", parse_special=False)[0]
        rows = [(prompt, own) for prompt in self.prompts]
        published = self.service.publish(
            0, name=self.name, make=lambda folder: teach_lora(self.service.model, folder, rows, **options)
        )
        assert published.version == number
        self.published.append(published)
        self.expected[f"{self.name}@{number}"] = self._reference(published.folder)
        assert all(ids[: len(own)] == own for ids in self.expected[f"{self.name}@{number}"])
        self.lives[number] = Life()
        return published

    def deploy(self, number: int) -> None:
        life = self.lives[number]
        life.possible.append([time.monotonic(), float("inf")])
        self.service.deploy(self.published[number - 1])
        self.service.wait_routable(f"{self.name}@{number}")
        life.certain.append([time.monotonic(), float("inf")])

    def undeploy(self, number: int) -> None:
        life = self.lives[number]
        life.certain[-1][1] = time.monotonic()
        self.service.undeploy(self.published[number - 1])
        wait_for(lambda: f"{self.name}@{number}" not in self.service.models())
        life.possible[-1][1] = time.monotonic()

    def _reference(self, folder: Path | None) -> list[list[int]]:
        model = AutoModelForCausalLM.from_pretrained(self.service.model, dtype=torch.float32)
        if folder is not None:
            model = PeftModel.from_pretrained(model, str(folder))
        model.generation_config.eos_token_id = None
        return [fresh_answer(model.eval(), prompt, TOKENS)[0] for prompt in self.prompts]


@dataclass(frozen=True)
class Asked:
    """One request as its client saw it. `headers_at` is when its answer began, and so after it was admitted."""

    model: str
    probe: int
    sent_at: float
    headers_at: float
    status: int
    named: set[str]
    token_ids: list[int]
    cached_tokens: int
    error: str


def ask(service: Service, model: str, probe: int, *, is_chat: bool, is_streamed: bool) -> Asked:
    """Greedily, for all TOKENS tokens, over one of the four ways there are."""
    body = {"model": model, "messages": [{"role": "user", "content": PROBES[probe]}], "max_tokens": TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "stream": is_streamed}
    if is_chat and is_streamed:
        body["stream_options"] = {"include_usage": True}
    sent_at = time.monotonic()
    url = "/v1/chat/completions" if is_chat else "/generate"
    with service.client.stream("POST", url, json=body, headers=service.bearer()) as response:
        headers_at = time.monotonic()
        text = response.read().decode()
    if response.status_code != 200:
        return Asked(model, probe, sent_at, headers_at, response.status_code, set(), [], 0, text)
    if is_streamed:
        datas = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert datas.pop() == "[DONE]", text
        parts = [json.loads(data) for data in datas]
    else:
        parts = [json.loads(text)]
    told = [choice for part in parts for choice in part["choices"]] if is_chat else parts
    return Asked(
        model,
        probe,
        sent_at,
        headers_at,
        200,
        {part["model"] for part in parts},
        [number for one in told for number in one.get("token_ids") or []],
        next(part["usage"] for part in reversed(parts) if part.get("usage"))["prompt_tokens_details"]["cached_tokens"],
        "",
    )


class Crowd:
    """Clients that ask, one request after another each, until `stop`, and so many requests at least."""

    def __init__(self, service: Service, models: Callable[[], list[str]]) -> None:
        self._service = service
        self._models = models
        self._stopping = threading.Event()
        self._left = itertools.count(1)
        self.asked: list[Asked] = []
        self.faults: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        try:
            while next(self._left) <= REQUESTS or not self._stopping.is_set():
                model, probe = chance.choice(self._models()), chance.randrange(len(PROBES))
                is_chat, is_streamed = chance.random() < 0.5, chance.random() < 0.5
                self.asked.append(ask(self._service, model, probe, is_chat=is_chat, is_streamed=is_streamed))
        except BaseException as fault:
            self.faults.append(fault)


def judge(versions: Versions, one: Asked) -> str:
    """What is wrong with an answer; "" where nothing is."""
    name, _, number = one.model.partition("@")
    span = (one.sent_at, one.headers_at)
    if one.status != 200:
        if one.status not in (404, 503):
            return "a fault"
        if name != versions.name:
            return "the base is always there"
        if not number:
            return "some version of the name is always there"
        return "it was there" if versions.lives[int(number)].must_answer(*span) else ""
    if len(one.named) != 1:
        return "it names several models"
    (named,) = one.named
    if named != one.model and (number or not named.startswith(f"{versions.name}@")):
        return "it was not asked"
    if one.token_ids != versions.expected[named][one.probe]:
        return "wrong tokens"
    if name != versions.name:
        return ""
    answered = int(named.partition("@")[2])
    if not versions.lives[answered].may_answer(*span):
        return "not live between question and answer"
    if not number and any(life.must_answer(*span) for newer, life in versions.lives.items() if newer > answered):
        return "stale: a newer version was there all the while"
    return ""


@pytest.mark.timeout(3600 if SOAK else 300)
def test_no_answer_is_wrong_or_stale_while_versions_flip(service: Service) -> None:
    torch.set_num_threads(1)
    versions = Versions(service, "herald")
    for _ in range(2 + FLIPS // 3):
        versions.publish()
    flips = 0
    versions.deploy(1)
    host = service.app.state.serving.directory.bases[0].host
    deployed = [1]

    def models() -> list[str]:
        recent = deployed[-1]
        return ["herald", "herald", "herald", "tiny", *(f"herald@{number}" for number in range(max(1, recent - 1), recent + 1))]

    with Crowd(service, models) as crowd:
        pace = 0
        while flips < FLIPS:
            new = deployed[-1] + 1
            versions.deploy(new)
            deployed.append(new)
            flips += 1
            if flips < FLIPS:  # back, and forth again: of the same name and number, in memory anew
                versions.undeploy(new)
                versions.deploy(new)
                flips += 2
            versions.undeploy(new - 1)
            pace += REQUESTS // (FLIPS // 3 + 1)
            wait_for(lambda pace=pace: len(crowd.asked) >= pace or crowd.faults, seconds=300)
    assert crowd.faults == []
    assert len(crowd.asked) >= REQUESTS
    wrong = [(found, one) for one in crowd.asked if (found := judge(versions, one))]
    assert wrong == [], f"{len(wrong)} of {len(crowd.asked)}"
    answers = [one for one in crowd.asked if one.status == 200]
    assert {name for one in answers for name in one.named} >= {"tiny", "herald@1", f"herald@{deployed[-1]}"}
    assert sum(one.cached_tokens > 200 for one in answers) > len(answers) / 2, "the prefix cache took part"
    assert service.app.state.serving.engine.load == 0
    wait_for(lambda: host.runner.pages.available == host.runner.pages.count)


def test_a_version_that_leaves_while_a_request_comes_in_gives_way_to_the_next(service: Service) -> None:
    torch.set_num_threads(1)
    for seed in (1, 2):
        published = service.publish(seed)
        service.deploy(published)
        service.wait_routable(f"pirate@{seed}")
    leaving = service.app.state.serving.directory.resolve(DEFAULT_PROJECT, "pirate").servable
    usual, arrivals, gone = leaving.prompt_ids, threading.Semaphore(0), threading.Event()

    def slowly(prompt: Any) -> list[int]:
        arrivals.release()
        gone.wait(30)
        return usual(prompt)

    leaving.prompt_ids = slowly
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(ask, service, model, 0, is_chat=is_chat, is_streamed=is_chat)
            for model in ("pirate", "pirate@2")
            for is_chat in (True, False)
        ]
        for _ in asked:
            assert arrivals.acquire(timeout=10)
        service.undeploy(published)
        wait_for(lambda: leaving.is_retired)
        gone.set()
        by_name, by_version = [one.result() for one in asked[:2]], [one.result() for one in asked[2:]]
    assert [(one.status, one.named) for one in by_name] == [(200, {"pirate@1"})] * 2
    assert [one.status for one in by_version] == [404, 404]
    assert all("model_not_found" in one.error for one in by_version)


def test_a_version_deployed_anew_is_not_taken_away_by_the_last_answer_of_its_former_stay(service: Service) -> None:
    """Of an adapter that only peft can run, which knows adapters by their names in memory."""
    torch.set_num_threads(1)
    versions = Versions(service, "herald")
    versions.publish(init_lora_weights="orthogonal")
    versions.deploy(1)
    first = service.app.state.serving.directory.resolve(DEFAULT_PROJECT, "herald").servable
    assert first.packed_tokens == 0
    body = {"model": "herald", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with service.client.stream("POST", "/generate", json=body, headers=service.bearer()) as response:
        lines = response.iter_lines()
        next(lines)
        versions.undeploy(1)
        versions.deploy(1)
        engine = service.app.state.serving.engine
        assert engine.load == 1, "the answer was to run on"
        assert sum(line.startswith("data: {") for line in lines) > 100
    wait_for(lambda: engine.load == 0)
    engine.call(lambda: None)
    answer = ask(service, "herald", 0, is_chat=False, is_streamed=False)
    assert judge(versions, answer) == ""
    assert answer.token_ids != versions.expected["tiny"][0]
