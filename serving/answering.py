"""From an admitted request to the bytes of its answer, the same for every surface; what these look like a writer says.

A request is refused, resolved to one immutable version and turned into tokens before the first byte of an answer; from then
on the engine delivers and the client's disconnect cancels, in a stream or not.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from typing import Protocol

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from core.data.conversation import Message
from core.errors import InvalidInput, Problem, UserError
from core.infer.engine import QueueFull, Retired, check_room
from core.infer.progress import End, Token
from core.infer.sampling import Sampling, choice_seed
from core.infer.servable import Servable
from core.infer.ticket import Failed, Item, Ticket
from serving.access import Serving
from serving.directory import Resolved
from serving.errors import error_response
from serving.meters import Watch
from serving.schemas import ChatMessage, ErrorBody, ErrorObject
from serving.schemas_sampling import DEFAULT_MAX_TOKENS, SamplingFields
from store.keys import Caller


class Collector(Protocol):
    """Makes the body of a whole answer. Fields that were never set are not written."""

    def add(self, choice: int, item: Token | End) -> None: ...

    def whole(self) -> BaseModel: ...


class Writer(Collector, Protocol):
    """Makes the chunks of a stream too; each item is added before its chunks are asked for."""

    def chunks(self, choice: int, item: Token | End) -> Iterable[BaseModel]: ...

    def closing(self) -> Iterable[BaseModel]:
        """What stands behind the last End."""


async def admit(
    serving: Serving,
    caller: Caller,
    model: str,
    prompt: str | list[ChatMessage],
    sampling: Callable[[Servable, int], Sampling],
    choices: int = 1,
) -> tuple[Resolved, list[int], "Answering"]:
    """What answers, the ids of the prompt, and the answer under way; `sampling` is given the servable and the prompt's length.

    A version may leave while the prompt is made into ids: then the name is looked up again, so that one version replaces
    another without a request lost. Raises what `Directory.resolve`, `sampling` and `Engine.submit` do.
    """
    while True:
        resolved = serving.directory.resolve(caller.project_id, model)
        ids = await _prompt_ids(resolved.servable, prompt)
        try:
            answering = Answering(serving, caller, resolved, ids, sampling(resolved.servable, len(ids)), choices)
        except Retired:
            continue  # the directory has forgotten it already
        return resolved, ids, answering


async def _prompt_ids(servable: Servable, prompt: str | list[ChatMessage]) -> list[int]:
    """Off the event loop: a long prompt takes a while. Raises InvalidInput."""
    if isinstance(prompt, str):
        return await run_in_threadpool(servable.prompt_ids, prompt)
    return await run_in_threadpool(servable.prompt_ids, [Message(message.role, message.text) for message in prompt])


def sampling_of(
    body: SamplingFields, servable: Servable, prompt_tokens: int, max_tokens: int | None, top_logprobs: int = 0
) -> Sampling:
    """Raises InvalidInput for what only the model can tell to be wrong."""
    if max_tokens is None:
        check_room(prompt_tokens, 1, servable.context_length)
        max_tokens = min(DEFAULT_MAX_TOKENS, servable.context_length - prompt_tokens)
    sampling = body.sampling(max_tokens, top_logprobs)
    if sampling.min_tokens > max_tokens:
        raise _wrong("min_tokens", f"it is {sampling.min_tokens}, and the answer ends after {max_tokens} tokens")
    for name, ids in (("logit_bias", [token for token, _ in sampling.logit_bias]), ("stop_token_ids", sampling.stop_token_ids)):
        # On a GPU an index out of range would take the whole process's context down, not just this request.
        if ids and max(ids) >= (vocabulary := servable.host.model.config.vocab_size):
            raise _wrong(name, f"the vocabulary has {vocabulary} ids, from 0; there is no {max(ids)}")
    return sampling


def _wrong(name: str, reason: str) -> InvalidInput:
    return InvalidInput(f"{name}: {reason}", [Problem("invalid-request", reason, pointer=f"/{name}")])


class Answering:
    """A request as tickets of the engine, one for each choice, read from the event loop."""

    def __init__(
        self, serving: Serving, caller: Caller, resolved: Resolved, ids: list[int], sampling: Sampling, choices: int = 1
    ) -> None:
        """Raises what `Engine.submit` does; then nothing is left in the engine."""
        self._items: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._watches: list[Watch] = []
        loop = asyncio.get_running_loop()
        seed = sampling.resolved_seed()
        label = ("" if serving.directory.is_base(resolved.name) else caller.project_id, resolved.name)
        for choice in range(choices):

            def deliver(item: Item, choice: int = choice) -> None:
                loop.call_soon_threadsafe(self._items.put_nowait, (choice, item))

            one = replace(sampling, seed=choice_seed(seed, choice))
            try:
                ticket = serving.engine.submit(resolved.servable, ids, one, deliver, tenant=caller.project_id)
            except UserError as error:
                if isinstance(error, QueueFull):
                    serving.meters.ended(label, "queue_full")
                self.cancel()
                raise
            self._tickets.append(ticket)
            self._watches.append(Watch(serving.meters, label))
        serving.meters.prompt_tokens.labels(*label).inc(len(ids))
        self._cached = serving.meters.cached_tokens.labels(*label)

    async def items(self) -> AsyncIterator[tuple[int, Item]]:
        """(choice, what it got), until each has its End or one has Failed. Leaving early cancels the rest."""
        ended = 0
        try:
            while ended < len(self._tickets):
                choice, item = await self._items.get()
                self._watches[choice].saw(item)
                if isinstance(item, End) and choice == 0:  # the prompt was counted once
                    self._cached.inc(self.cached_tokens)
                yield choice, item
                if isinstance(item, Failed):
                    return
                ended += isinstance(item, End)
        finally:
            self.cancel()

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in memory before the first choice began."""
        return self._tickets[0].cached_tokens

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()
        for watch in self._watches:
            watch.ended("cancelled")


def streamed(answering: Answering, writer: Writer) -> Response:
    """The answer as server-sent events."""
    return _Stream(answering, writer)


async def collected(request: Request, answering: Answering, collector: Collector) -> Response:
    """The answer in one piece."""
    collecting = asyncio.create_task(_collect(answering, collector))
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        # 499, which nobody is left to read, is what access logs know a client's leaving by.
        return await collecting if collecting.done() else Response(status_code=499)
    finally:
        answering.cancel()
        collecting.cancel()
        leaving.cancel()


class _Stream(StreamingResponse):
    def __init__(self, answering: Answering, writer: Writer) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(answering, writer), media_type="text/event-stream", headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client may be gone before the generator is begun, whose own clean-up then never runs; and one that is cancelled
        # later would wait for the garbage collector with it.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()


async def _collect(answering: Answering, collector: Collector) -> Response:
    async for choice, item in answering.items():
        if isinstance(item, Failed):
            return error_response(500, item.message, "server_error", code="generation_failed")
        collector.add(choice, item)
    return Response(collector.whole().model_dump_json(exclude_unset=True), media_type="application/json")


async def _events(answering: Answering, writer: Writer) -> AsyncIterator[str]:
    async for choice, item in answering.items():
        if isinstance(item, Failed):
            error = ErrorObject(message=item.message, type="server_error", param=None, code="generation_failed")
            yield _event(ErrorBody(error=error))
            return
        writer.add(choice, item)
        for chunk in writer.chunks(choice, item):
            yield _event(chunk)
    for chunk in writer.closing():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
