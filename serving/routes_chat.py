"""`POST /v1/chat/completions`."""

import hashlib
import time
import uuid
from collections.abc import Iterable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from core.data.tokenizer import Tokenizer
from core.infer.progress import End, Token
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from serving.access import CallerDep, ServingDep
from serving.answering import Answering, admit, collected, sampling_of, streamed
from serving.directory import Resolved
from serving.schemas import ERROR_RESPONSES, Usage
from serving.schemas_chat import (
    AnswerMessage,
    ChatChunk,
    ChatRequest,
    ChatResponse,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    TokenLogprob,
    TopLogprob,
)

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=ChatResponse,
    responses={**ERROR_RESPONSES, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    summary="Answer messages, in OpenAI's shapes",
)
async def chat(body: ChatRequest, request: Request, serving: ServingDep, caller: CallerDep) -> Response:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens

    def sampling(servable: Servable, prompt_tokens: int) -> Sampling:
        return sampling_of(body, servable, prompt_tokens, max_tokens, body.top_logprobs)

    resolved, ids, answering = await admit(serving, caller, body.model, body.messages, sampling, body.n)
    writer = _Writer(body, resolved, ids, answering)
    return streamed(answering, writer) if body.stream else await collected(request, answering, writer)


class _Writer:
    def __init__(self, body: ChatRequest, resolved: Resolved, ids: list[int], answering: Answering) -> None:
        self._body = body
        self._answering = answering
        self._tokenizer = resolved.servable.tokenizer
        self._prompt_ids = ids
        identity = f"{resolved.servable.host.identity.model_dump_json()} {resolved.name}"
        self._frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": resolved.name,
            "system_fingerprint": f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
        }
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._items: list[list[Token]] = [[] for _ in range(body.n)]
        self._ends: list[End | None] = [None] * body.n
        self._begun: set[int] = set()

    def add(self, choice: int, item: Token | End) -> None:
        if isinstance(item, End):
            self._ends[choice] = item
        else:
            self._items[choice].append(item)

    def chunks(self, choice: int, item: Token | End) -> Iterable[ChatChunk]:
        if choice not in self._begun:
            first = self._chunk([ChunkChoice(index=choice, delta=Delta(role="assistant", content=""), **_NO_END)])
            if self._body.return_token_ids and not self._begun:
                first.prompt_token_ids = self._prompt_ids
            self._begun.add(choice)
            yield first
        if isinstance(item, End):
            if item.text:
                yield self._chunk([ChunkChoice(index=choice, delta=Delta(content=item.text), **_NO_END)])
            yield self._chunk([ChunkChoice(index=choice, delta=Delta(), logprobs=None, finish_reason=item.reason)])
        elif item.text or self._body.logprobs or self._body.return_token_ids:
            told = ChunkChoice(index=choice, delta=Delta(content=item.text), **_NO_END)
            if self._body.logprobs:
                told.logprobs = ChoiceLogprobs(content=[_logprob(item, self._tokenizer)])
            if self._body.return_token_ids:
                told.token_ids = [item.id]
            yield self._chunk([told])

    def closing(self) -> Iterable[ChatChunk]:
        if self._with_usage:
            last = self._chunk([])
            last.usage = self._usage()
            yield last

    def whole(self) -> ChatResponse:
        choices = [self._choice(number, end) for number, end in enumerate(self._ends) if end is not None]
        whole = ChatResponse(**self._frame, object="chat.completion", choices=choices, usage=self._usage())
        if self._body.return_token_ids:
            whole.prompt_token_ids = self._prompt_ids
        return whole

    def _choice(self, number: int, end: End) -> Choice:
        items = self._items[number]
        message = AnswerMessage(role="assistant", content="".join(item.text for item in items) + end.text)
        logprobs = ChoiceLogprobs(content=[_logprob(item, self._tokenizer) for item in items]) if self._body.logprobs else None
        choice = Choice(index=number, message=message, logprobs=logprobs, finish_reason=end.reason)
        if self._body.return_token_ids:
            choice.token_ids = [item.id for item in items]
        return choice

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(**self._frame, object="chat.completion.chunk", choices=choices)
        if self._with_usage:
            chunk.usage = None  # set, and so written: a client that asked for usage finds the field in every chunk
        return chunk

    def _usage(self) -> Usage:
        return Usage.of(len(self._prompt_ids), sum(map(len, self._items)), self._answering.cached_tokens)


_NO_END = {"logprobs": None, "finish_reason": None}


def _logprob(item: Token, tokenizer: Tokenizer) -> TokenLogprob:
    top = [TopLogprob(**_token(number, value, tokenizer)) for number, value in item.top]
    return TokenLogprob(**_token(item.id, item.logprob, tokenizer), top_logprobs=top)


def _token(number: int, logprob: float, tokenizer: Tokenizer) -> dict[str, str | float | list[int] | None]:
    text = tokenizer.decode([number], skip_special=False)
    is_whole = "\N{REPLACEMENT CHARACTER}" not in text
    # -inf is no JSON; OpenAI writes this number where a probability is none.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if is_whole else None}
