"""Every error of every route in the one shape that OpenAI's clients read."""

import asyncio
from datetime import timedelta
from typing import Any

import httpx
import pytest

from core.errors import InvalidInput
from serving.app import create_app
from store.db import Database
from store.keys import create_key, revoke_key
from store.settings import Settings
from store.tables import DEFAULT_PROJECT
from tests.serving.conftest import Service


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def test_wrong_fields_get_400_with_the_field_named(service: Service) -> None:
    wrong: list[tuple[dict[str, Any], str | None]] = [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, None),
        ({"stop": "x" * 65}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, None),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "b"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"stream": "yes"}, "stream"),
        ({"n": 2}, "n"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, None),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"min_tokens": 17}, "min_tokens"),
    ]
    for options, param in wrong:
        error = error_of(service.ask("tiny", **options), 400)
        assert error["type"] == "invalid_request_error"
        assert error["code"] == ("invalid_role" if param == "messages.0.role" else "invalid_request")
        if param is not None:
            assert error["param"] == param, options
    assert "exactly one" in error_of(service.ask("tiny", prompt="a", messages=[{"role": "user", "content": "b"}]), 400)["message"]


def test_wrong_fields_of_the_other_shape_are_named_too(service: Service) -> None:
    wrong: list[tuple[dict[str, Any], str | None]] = [
        ({"inputs": ""}, "inputs"),
        ({"inputs": "a", "stream": True}, "stream"),
        ({"inputs": "a", "max_tokens": 3}, "max_tokens"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens"),
        ({"inputs": "a", "parameters": {"best_of": 2}}, "parameters.best_of"),
        ({"inputs": "a", "parameters": {"model": "tiny", "adapter_id": "pirate"}}, "parameters"),
    ]
    for body, param in wrong:
        error = error_of(service.client.post("/generate", json=body, headers=service.bearer()), 400)
        assert (error["code"], error["param"]) == ("invalid_request", param)
    body = {"inputs": "a", "parameters": {"adapter_id": "absent"}}
    assert error_of(service.client.post("/generate", json=body, headers=service.bearer()), 404)["code"] == "model_not_found"


def test_all_wrong_fields_are_told_at_once(service: Service) -> None:
    message = error_of(service.ask("tiny", top_p=7, temperature=9, best_of=3), 400)["message"]
    assert all(name in message for name in ("top_p", "temperature", "best_of"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nul",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "top_p": -Infinity}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"model": ' + b"[" * 100_000,
    ],
)
def test_bodies_that_are_no_request_get_400(service: Service, body: bytes) -> None:
    headers = service.bearer() | {"Content-Type": "application/json"}
    error_of(service.client.post("/generate", content=body, headers=headers), 400)


def test_a_prompt_longer_than_the_context_says_so(service: Service) -> None:
    for options in ({"prompt": "word " * 600}, {"prompt": "word " * 600, "max_tokens": None}, {"max_tokens": 512}):
        error = error_of(service.ask("tiny", **options), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "max_tokens"
        assert "512" in error["message"]


def test_without_max_tokens_the_answer_fits_into_the_context(service: Service) -> None:
    service.app.state.serving.directory.bases[0].stop_ids = ()
    assert service.ask("tiny", prompt="\n" * 500, max_tokens=None).json()["usage"]["total_tokens"] <= 512


def test_a_body_over_the_limit_gets_413(service: Service) -> None:
    # Over the limit by the JSON around it: the refusal closes the connection, and what was still on its way would reset it.
    error = error_of(service.ask("tiny", prompt="x" * (8 << 20)), 413)
    assert error["code"] == "request_too_large"


def test_unknown_models_get_404(service: Service) -> None:
    for name in ("absent", "tiny@1", "tiny:nf4", "@", "ada_x@", "\x00", "../tiny", "ü" * 200):
        error = error_of(service.ask(name), 404)
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"


def test_unknown_routes_and_methods_have_the_shape_too(service: Service) -> None:
    assert error_of(service.client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    assert error_of(service.client.get("/static-offline-docs/nothing.js"), 404)["code"] == "unknown_url"
    response = service.client.get("/generate")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_only_a_valid_key_with_the_scope_is_let_in(service: Service) -> None:
    pepper = service.settings.pepper
    with service.database.transaction() as session:
        _, reader = create_key(session, pepper, DEFAULT_PROJECT, name="r", scopes=["jobs:read"])
        _, admin = create_key(session, pepper, DEFAULT_PROJECT, name="a", scopes=["admin"])
        _, expired = create_key(session, pepper, DEFAULT_PROJECT, name="e", scopes=["admin"], lifetime=timedelta(seconds=-1))
        row, revoked = create_key(session, pepper, DEFAULT_PROJECT, name="v", scopes=["admin"])
        revoke_key(session, row.id)
    client = service.client
    bad = [{}, {"Authorization": "Basic abc"}, *(service.bearer(k) for k in ("x", expired, revoked, service.key[:-1] + "g"))]
    for headers in bad:
        for response in (
            client.get("/v1/models", headers=headers),
            client.post("/generate", json={"model": "tiny", "prompt": "a"}, headers=headers),
        ):
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    error = error_of(client.get("/v1/models", headers=service.bearer(reader)), 403)
    assert error["code"] == "insufficient_scope"
    assert "models:infer" in error["message"]
    assert service.models(admin) == ["tiny", "tiny:fp32"]


def test_a_model_whose_numbers_break_fails_the_request_and_only_it(service: Service) -> None:
    import torch

    model = service.app.state.serving.directory.bases[0].host.model
    weight = model.model.norm.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    error = error_of(service.ask("tiny"), 500)
    assert error["code"] == "generation_failed"
    assert "not finite" in error["message"]
    chunks, last = service.stream("tiny")
    assert chunks == []
    assert '"error"' in last
    with torch.no_grad():
        weight.copy_(saved)
    assert service.ask("tiny").status_code == 200


def test_a_bug_in_the_engine_fails_the_request_and_only_it(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    compute = service.app.state.serving.directory.bases[0].host.runner._compute
    model, compute._model = compute._model, None
    assert error_of(service.ask("tiny"), 500)["message"] == "the engine failed on this request"
    assert "failed" in caplog.text
    compute._model = model
    assert service.ask("tiny").status_code == 200


def test_a_lost_database_is_503_with_a_time_to_come_back(service: Service) -> None:
    service.app.state.serving.database.engine.dispose()
    broken = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    object.__setattr__(service.app.state.serving, "database", broken)
    response = service.client.get("/v1/models", headers=service.bearer())
    error_of(response, 503)
    assert int(response.headers["retry-after"]) > 0
    error_of(service.client.get("/readyz"), 503)


@pytest.mark.parametrize(
    ("bases", "sentence"),
    [
        ((), "name at least one model (registered: tiny)"),
        (("absent",), "no model absent is registered (registered: tiny)"),
        (("tiny:int3", "absent:nf4"), "tiny:int3: is not name"),
        (("tiny:bf16:nf4",), "is not name"),
        (("tiny", "tiny"), "tiny: named twice"),
    ],
)
def test_an_endpoint_without_its_bases_refuses_to_start(prepared: Service, bases: tuple[str, ...], sentence: str) -> None:
    settings: Settings = prepared.settings.model_copy(update={"bases": bases})
    app = create_app(settings)

    async def start() -> None:
        async with app.router.lifespan_context(app):
            raise AssertionError("it started")

    with pytest.raises(InvalidInput) as refused:
        asyncio.run(start())
    assert sentence in refused.value.detail
