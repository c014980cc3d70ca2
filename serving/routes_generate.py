"""`POST /generate`."""

import time
import uuid
from collections.abc import Iterable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from core.errors import Unavailable
from core.infer.progress import End, Token
from core.infer.sampling import Sampling
from core.infer.servable import Servable
from serving.access import CallerDep, Serving, ServingDep
from serving.answering import Answering, admit, collected, sampling_of, streamed
from serving.schemas import ERROR_RESPONSES, Usage
from serving.schemas_generate import (
    AnyGenerateRequest,
    GenerateChunk,
    GenerateRequest,
    GenerateResponse,
    InputsDetails,
    InputsRequest,
    InputsResponse,
    InputsToken,
)

router = APIRouter()


@router.post(
    "/generate",
    response_model=GenerateResponse | InputsResponse,
    responses={**ERROR_RESPONSES, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    summary="Continue a prompt or answer messages",
)
async def generate(body: AnyGenerateRequest, request: Request, serving: ServingDep, caller: CallerDep) -> Response:
    asked = body.as_generate(_first_base(serving)) if isinstance(body, InputsRequest) else body
    prompt = asked.prompt if asked.prompt is not None else asked.messages or []

    def sampling(servable: Servable, prompt_tokens: int) -> Sampling:
        return sampling_of(asked, servable, prompt_tokens, asked.max_tokens)

    resolved, ids, answering = await admit(serving, caller, asked.model, prompt, sampling)
    if isinstance(body, InputsRequest):
        return await collected(request, answering, _InputsCollector(body, resolved.name, resolved.servable))
    writer = _Writer(body, resolved.name, ids, answering)
    return streamed(answering, writer) if body.stream else await collected(request, answering, writer)


def _first_base(serving: Serving) -> str:
    bases = serving.directory.bases
    if not bases:
        raise Unavailable("The bases are being loaded")
    return bases[0].host.identity.model


class _Gathered:
    """The tokens of the one answer, and its end."""

    def __init__(self) -> None:
        self._items: list[Token] = []
        self._end: End | None = None

    def add(self, choice: int, item: Token | End) -> None:
        if isinstance(item, End):
            self._end = item
        else:
            self._items.append(item)


class _Writer(_Gathered):
    """Our own shape, with the options that were asked for."""

    def __init__(self, body: GenerateRequest, model: str, ids: list[int], answering: Answering) -> None:
        super().__init__()
        self._answering = answering
        self._with_ids = body.return_token_ids
        self._with_logprobs = body.logprobs
        self._prompt_ids = ids
        self._frame = {"id": f"gen-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}

    def chunks(self, choice: int, item: Token | End) -> Iterable[GenerateChunk]:
        # Every field is set, and so written: what a chunk has none of is null.
        nothing = {"finish_reason": None, "usage": None, "prompt_token_ids": None, "token_ids": None, "logprobs": None}
        chunk = GenerateChunk(**self._frame, text=item.text, **nothing)
        if isinstance(item, End):
            chunk.finish_reason, chunk.usage = item.reason, self._usage()
            if self._with_ids:
                chunk.prompt_token_ids = self._prompt_ids
        elif not (item.text or self._with_ids or self._with_logprobs):
            return
        else:
            if self._with_ids:
                chunk.token_ids = [item.id]
            if self._with_logprobs:
                chunk.logprobs = [item.logprob]
        yield chunk

    def closing(self) -> Iterable[GenerateChunk]:
        return ()

    def whole(self) -> GenerateResponse:
        assert self._end is not None
        text = "".join(item.text for item in self._items) + self._end.text
        whole = GenerateResponse(**self._frame, text=text, finish_reason=self._end.reason, usage=self._usage())
        if self._with_ids:
            whole.prompt_token_ids, whole.token_ids = self._prompt_ids, [item.id for item in self._items]
        if self._with_logprobs:
            whole.logprobs = [item.logprob for item in self._items]
        return whole

    def _usage(self) -> Usage:
        return Usage.of(len(self._prompt_ids), len(self._items), self._answering.cached_tokens)


class _InputsCollector(_Gathered):
    """The shape of text-generation-inference; not streamed."""

    def __init__(self, body: InputsRequest, model: str, servable: Servable) -> None:
        super().__init__()
        self._before = body.inputs if body.parameters.return_full_text else ""
        self._seed = body.parameters.seed
        self._with_details = body.parameters.details
        self._model = model
        self._servable = servable

    def whole(self) -> InputsResponse:
        assert self._end is not None
        text = self._before + "".join(item.text for item in self._items) + self._end.text
        whole = InputsResponse(generated_text=text, model=self._model)
        if self._with_details:
            whole.details = InputsDetails(
                finish_reason=self._reason(self._end),
                generated_tokens=len(self._items),
                seed=self._seed,
                prefill=[],
                tokens=[self._token(item) for item in self._items],
            )
        return whole

    def _reason(self, end: End) -> str:
        if end.reason == "length":
            return "length"
        return "eos_token" if self._items[-1].id in self._servable.stop_ids else "stop_sequence"

    def _token(self, item: Token) -> InputsToken:
        tokenizer = self._servable.tokenizer
        is_special = item.id in tokenizer.special.values()
        text = tokenizer.decode([item.id], skip_special=False)
        return InputsToken(id=item.id, text=text, logprob=item.logprob, special=is_special)
