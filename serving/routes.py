"""The routes of the inference endpoint: generate, models, health.

A request is refused, resolved to one immutable version and turned into tokens before the first byte of an answer; from then
on the engine delivers and the client's disconnect cancels, in a stream or not.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import text

from core.data.conversation import Message
from core.errors import Unauthenticated, Unavailable
from core.infer.engine import Engine, check_room
from core.infer.progress import End
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from core.infer.ticket import Failed, Item, Ticket
from serving.deployments import Follower
from serving.directory import Directory
from serving.errors import error_response
from serving.schemas import (
    DEFAULT_MAX_TOKENS,
    ERROR_RESPONSES,
    ErrorBody,
    ErrorObject,
    GenerateChunk,
    GenerateRequest,
    GenerateResponse,
    ModelLine,
    ModelList,
    Usage,
)
from store.db import Database
from store.keys import Caller, authenticate

router = APIRouter()
_bearer = HTTPBearer(auto_error=False, description="A strop API key with the scope models:infer.")


@dataclass(frozen=True)
class Serving:
    """What the routes work with; on `app.state.serving`."""

    database: Database
    pepper: bytes
    engine: Engine
    directory: Directory
    follower: Follower
    started_at: int


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


ServingDep = Annotated[Serving, Depends(_serving)]


def _caller(serving: ServingDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    if credentials is None:
        raise Unauthenticated("Send an API key: Authorization: Bearer strop_sk_...")
    with serving.database.transaction() as session:
        caller = authenticate(session, serving.pepper, credentials.credentials)
    caller.require("models:infer")
    return caller


CallerDep = Annotated[Caller, Depends(_caller)]


@router.post(
    "/generate",
    response_model=GenerateResponse,
    response_model_exclude_unset=True,
    responses={**ERROR_RESPONSES, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    summary="Continue a prompt or answer messages",
)
async def generate(body: GenerateRequest, request: Request, serving: ServingDep, caller: CallerDep) -> Response:
    resolved = serving.directory.resolve(caller.project_id, body.model)
    prompt_ids = await run_in_threadpool(_prompt_ids, resolved.servable, body)
    answering = _Answering(serving.engine, resolved.servable, prompt_ids, _sampling(body, resolved.servable, prompt_ids))
    writer = _Writer(body, resolved.name, prompt_ids)
    if body.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(answering, writer), media_type="text/event-stream", headers=headers)
    collecting = asyncio.create_task(_collect(answering, writer))
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        # 499, which nobody is left to read, is what access logs know a client's leaving by.
        return await collecting if collecting.done() else Response(status_code=499)
    finally:
        answering.ticket.cancel()
        collecting.cancel()
        leaving.cancel()


@router.get("/v1/models", responses=ERROR_RESPONSES, summary="Bases, and adapters of the key's project that can be asked now")
def models(serving: ServingDep, caller: CallerDep) -> ModelList:
    return ModelList(
        data=[
            ModelLine(id=line.id, created=serving.started_at, root=line.root, parent=None if line.is_base else line.root)
            for line in serving.directory.listing(caller.project_id)
        ]
    )


@router.get("/healthz", summary="The process lives", responses={500: ERROR_RESPONSES[500]})
def healthz(serving: ServingDep) -> dict[str, str]:
    if not serving.engine.is_alive:
        raise RuntimeError("the engine's thread has ended")
    return {"status": "ok"}


@router.get("/readyz", summary="Bases loaded, database reachable, deployments followed", responses={503: ERROR_RESPONSES[503]})
def readyz(serving: ServingDep) -> dict[str, str]:
    if serving.follower.problem is not None:
        raise Unavailable(f"Not ready: {serving.follower.problem}")
    with serving.database.transaction() as session:
        session.execute(text("SELECT 1"))
    return {"status": "ready"}


def _prompt_ids(servable: Servable, body: GenerateRequest) -> list[int]:
    if body.prompt is not None:
        return servable.prompt_ids(body.prompt)
    return servable.prompt_ids([Message(message.role, message.content) for message in body.messages or []])


def _sampling(body: GenerateRequest, servable: Servable, prompt_ids: list[int]) -> Sampling:
    if body.max_tokens is None:
        check_room(len(prompt_ids), 1, servable.context_length)
    room = servable.context_length - len(prompt_ids)
    return Sampling(
        max_tokens=body.max_tokens or min(DEFAULT_MAX_TOKENS, room),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=body.stop_strings,
    )


class _Answering:
    """A submitted request, read from the event loop."""

    def __init__(self, engine: Engine, servable: Servable, prompt_ids: list[int], sampling: Sampling) -> None:
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(item: Item) -> None:
            loop.call_soon_threadsafe(self._items.put_nowait, item)

        self.ticket: Ticket = engine.submit(servable, prompt_ids, sampling, deliver)

    async def items(self) -> AsyncIterator[Item]:
        """Tokens, then an End or a Failed. Leaving early cancels the request."""
        try:
            while True:
                item = await self._items.get()
                yield item
                if isinstance(item, End | Failed):
                    return
        finally:
            self.ticket.cancel()


class _Writer:
    """Makes the response's bodies, with the options that were asked for."""

    def __init__(self, body: GenerateRequest, model: str, prompt_ids: list[int]) -> None:
        self._with_ids = body.return_token_ids
        self._with_logprobs = body.logprobs
        self._prompt_ids = prompt_ids
        self._frame = {"id": f"gen-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []

    def chunk(self, item: Item) -> GenerateChunk | None:
        """The chunk an item makes; None where it says nothing yet."""
        assert not isinstance(item, Failed)
        if isinstance(item, End):
            self._texts.append(item.text)
            return GenerateChunk(
                **self._frame,
                text=item.text,
                finish_reason=item.reason,
                usage=self._usage(),
                prompt_token_ids=self._prompt_ids if self._with_ids else None,
            )
        self._texts.append(item.text)
        self._token_ids.append(item.id)
        self._logprobs.append(item.logprob)
        if not (item.text or self._with_ids or self._with_logprobs):
            return None
        return GenerateChunk(
            **self._frame,
            text=item.text,
            token_ids=[item.id] if self._with_ids else None,
            logprobs=[item.logprob] if self._with_logprobs else None,
        )

    def whole(self, end: End) -> GenerateResponse:
        extras = {}
        if self._with_ids:
            extras = {"prompt_token_ids": self._prompt_ids, "token_ids": self._token_ids}
        answer = GenerateResponse(
            **self._frame, text="".join(self._texts), finish_reason=end.reason, usage=self._usage(), **extras
        )
        return answer.model_copy(update={"logprobs": self._logprobs}) if self._with_logprobs else answer

    def _usage(self) -> Usage:
        prompt, completion = len(self._prompt_ids), len(self._token_ids)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def _collect(answering: _Answering, writer: _Writer) -> Response:
    async for item in answering.items():
        if isinstance(item, Failed):
            return error_response(500, item.message, "server_error", code="generation_failed")
        writer.chunk(item)
        if isinstance(item, End):
            whole = writer.whole(item)
            return JSONResponse(whole.model_dump(exclude_none=True))
    raise AssertionError("the engine always ends an answer")


async def _events(answering: _Answering, writer: _Writer) -> AsyncIterator[str]:
    try:
        async for item in answering.items():
            if isinstance(item, Failed):
                error = ErrorObject(message=item.message, type="server_error", param=None, code="generation_failed")
                yield f"data: {ErrorBody(error=error).model_dump_json()}\n\n"
                return
            if (chunk := writer.chunk(item)) is not None:
                yield f"data: {chunk.model_dump_json()}\n\n"
    finally:
        # The inner generator's own clean-up would wait for the garbage collector when this one is cancelled.
        answering.ticket.cancel()
    yield "data: [DONE]\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
