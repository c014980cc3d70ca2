"""Crowds of clients that leave: nothing of them is left in the engine, and who stays notices nothing."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.lora import teach_lora
from tests.serving.conftest import Service, wait_for

CROWD = 20
MODELS = ("tiny", "packed", "by-peft")
LONG = {"prompt": "What is the capital of France?", "max_tokens": 480, "temperature": 1.0, "seed": 4, "ignore_eos": True}


@pytest.fixture
def full(service: Service) -> Service:
    """The base, an adapter that packed steps take and one that peft answers; so few run at once that most of a crowd wait."""
    torch.set_num_threads(1)
    service.app.state.serving.engine._most_running = 8
    service.deploy(service.publish(1, name="packed"))
    rows = [([5, 6, 7], [9])]
    service.deploy(
        service.publish(
            0, name="by-peft", make=lambda folder: teach_lora(service.model, folder, rows, init_lora_weights="orthogonal")
        )
    )
    for name in MODELS:
        service.wait_routable(name)
    return service


def arrive(service: Service, number: int, *, is_streamed: bool) -> http.client.HTTPConnection:
    """A client in the middle of its request."""
    url = service.client.base_url
    connection = http.client.HTTPConnection(url.host, url.port, timeout=30)
    body = json.dumps({"model": MODELS[number % 3], "stream": is_streamed, **LONG})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json", **service.bearer()})
    return connection


@pytest.mark.parametrize("is_streamed", [True, False], ids=["streams", "whole answers"])
def test_a_crowd_that_leaves_is_forgotten(is_streamed: bool, full: Service) -> None:
    serving = full.app.state.serving
    alone = full.ask("packed", **LONG).json()["text"]
    pages = serving.directory.bases[0].host.runner.pages
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            stays = pool.submit(full.ask, "packed", **LONG)
            wait_for(lambda: serving.engine.load == 1)
            crowd = [arrive(full, number, is_streamed=is_streamed) for number in range(CROWD)]
            wait_for(lambda: serving.engine.load == CROWD + 1)
            for connection in crowd:
                connection.close()
            wait_for(lambda: serving.engine.load <= 1)
            assert stays.result().json()["text"] == alone
        wait_for(lambda: serving.engine.load == 0)
        wait_for(lambda: pages.available == pages.count)
    assert len(serving.engine._open) == 0
