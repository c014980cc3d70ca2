"""A decoder's passes forward and back as recorded graphs, which the host starts with two calls instead of thousands.

A GPU that is told of every kernel as it comes waits for whoever tells it: a step of eight rows has some 2,000 kernels and is over
before they are all named, and on a slow host even a step of 16,000 tokens waits a fifth of its time. A CUDA graph
(CUDA C++ Programming Guide, "CUDA Graphs") is told once. It needs the same shapes and the same memory every time, so tokens and
rows are rounded up to few sizes: behind the batch's rows stands one more, of padding, which carries no loss. Head and loss stay
outside: how many tokens carry loss differs from batch to batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.modeling_outputs import BaseModelOutputWithPast

from core.train.fused.layer import FusedLayer

_FINENESS = 5
"""Tokens are rounded up to the 32nd part (2^-5) of the power of two next to them: 1.6% of padding, and for steps of like rows
some ten sizes, each of which costs a slow step once."""
_LEAST_TOKENS = 128
_ROWS = 32
_LEAST_LONGEST = 256
_MOST_GRAPHS = 64

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""Takes what is to be done and gives what does it again. It may do it or not; whoever records says it again before he reads."""


class Size(NamedTuple):
    """What has to be equal for a graph to fit."""

    tokens: int
    rows: int
    longest: int

    @classmethod
    def of(cls, tokens: int, rows: int, longest: int) -> "Size":
        """The least that holds so many tokens in so many rows, and a row of padding."""
        step = max(_LEAST_TOKENS, 1 << max(0, round(math.log2(tokens)) - _FINENESS))
        longest = max(longest, step, _LEAST_LONGEST)
        return cls(_up(tokens, step), _up(rows + 1, _ROWS), 1 << (longest - 1).bit_length())


@dataclass
class _Graph:
    forward: Work
    backward: Work
    hidden: torch.Tensor
    gradient: torch.Tensor


class GraphedDecoder:
    """Takes the place of the forward of a decoder whose layers are fused. Whatever is no packed batch in training goes through
    the decoder's own.

    Gradients of its parameters lie where the graphs add to them; a caller may set them to None between steps, as optimizers do.
    """

    def __init__(
        self, decoder: Any, layer: FusedLayer, recorder: Callable[[torch.device], Recorder], device: torch.device
    ) -> None:
        """`layer` is one of the decoder's; `recorder` makes what records, anew whenever all graphs are let go."""
        self._decoder, self._layer, self._device = decoder, layer, device
        self._recorder, self._record = recorder, recorder(device)
        others = [p for p in decoder.parameters() if p.requires_grad and p not in layer.adapters.gradients]
        self._others = {parameter: torch.zeros_like(parameter) for parameter in others}
        self._graphs: dict[Size, _Graph] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # what autograd sees in the parameters' place

    def forward(self, input_ids: torch.Tensor | None = None, **options: Any) -> BaseModelOutputWithPast:
        """As the decoder's own; a packed batch [1, N] in training gives hidden states of N tokens and of the padding behind."""
        bounds = options.get("cu_seq_lens_q")
        if input_ids is None or bounds is None or not torch.is_grad_enabled() or not self._layer.is_on():
            own: BaseModelOutputWithPast = type(self._decoder).forward(self._decoder, input_ids=input_ids, **options)
            return own
        size = Size.of(input_ids.shape[1], len(bounds) - 1, options["max_length_q"])
        self._fill(size, input_ids, options["position_ids"], bounds)
        self._layer.adapters.refresh(self._dtype())
        self._lay_gradients()
        graph = self._graphs.pop(size, None) or self._recorded(size)
        self._graphs[size] = graph  # the last to go
        hidden: torch.Tensor = _Passes.apply(graph, self._anchor)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def drop(self) -> None:
        """Let go of all graphs and their memory."""
        self._graphs.clear()
        self._record = self._recorder(self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _recorded(self, size: Size) -> _Graph:
        if len(self._graphs) == _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        try:
            return self._recorded_once(size)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        # Outside the except block, whose traceback holds tensors. An allocator that can't grow a graph's memory (without
        # expandable segments) has taken new memory for a larger size.
        self.drop()
        return self._recorded_once(size)

    def _recorded_once(self, size: Size) -> _Graph:
        hidden, gradient = self._hidden(size, "hidden"), self._hidden(size, "gradient")
        inputs = self._inputs(size)
        dtype, kind = self._dtype(), self._device.type
        found: list[GradientEdge] = []

        def forward() -> None:
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                last = type(self._decoder).forward(self._decoder, use_cache=False, **inputs).last_hidden_state
            hidden.copy_(last.detach())
            found.append(get_gradient_edge(last))  # the way back without the tensor

        def backward() -> None:
            torch.autograd.backward(found.pop(), gradient)

        self._warm(inputs)
        return _Graph(self._record(forward), self._record(backward), hidden, gradient)

    def _warm(self, inputs: dict[str, Any]) -> None:
        """The ends and two layers both ways, the first of which may have nothing to hand back to: a kernel that was never
        started, or compiled, can't be recorded."""
        decoder = self._decoder
        parts = [decoder.embed_tokens, *dict.fromkeys([decoder.layers[0], decoder.layers[-1]]), decoder.norm]
        with torch.autocast(self._device.type, self._dtype(), enabled=self._dtype() != torch.float32, cache_enabled=False):
            stream = decoder.embed_tokens(inputs["input_ids"])
            turn = decoder.rotary_emb(stream, position_ids=inputs["position_ids"])
            for layer in parts[1:-1]:
                stream = layer(stream, position_embeddings=turn, **inputs)
            result = decoder.norm(stream)
        trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        with self._layer.adapters.gradients_aside():
            torch.autograd.grad(result, trained, result.detach(), allow_unused=True)

    def _fill(self, size: Size, input_ids: torch.Tensor, position_ids: torch.Tensor, bounds: torch.Tensor) -> None:
        inputs, count, ends = self._inputs(size), input_ids.shape[1], len(bounds)
        inputs["input_ids"][:, :count].copy_(input_ids)
        inputs["input_ids"][:, count:].zero_()
        inputs["position_ids"][:, :count].copy_(position_ids)
        torch.arange(size.tokens - count, out=inputs["position_ids"][0, count:])
        inputs["cu_seq_lens_q"][:ends].copy_(bounds)
        inputs["cu_seq_lens_q"][ends:].fill_(size.tokens)

    def _inputs(self, size: Size) -> dict[str, Any]:
        bounds = self._buffer("bounds", size.rows + 1, torch.int32)
        return {
            "input_ids": self._buffer("ids", size.tokens)[None],
            "position_ids": self._buffer("positions", size.tokens)[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": size.longest,
            "max_length_k": size.longest,
        }

    def _hidden(self, size: Size, name: str) -> torch.Tensor:
        width, dtype = self._decoder.config.hidden_size, self._decoder.norm.weight.dtype
        return self._buffer(name, size.tokens * width, dtype).view(1, size.tokens, width)

    def _buffer(self, name: str, count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """The first `count` of a buffer that all graphs share; one that has to grow takes them with it."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < count:
            self.drop()
            self._buffers[name] = buffer = torch.zeros(count + count // 4, dtype=dtype, device=self._device)
        return buffer[:count]

    def _lay_gradients(self) -> None:
        self._layer.adapters.lay_gradients()
        if fresh := [own for parameter, own in self._others.items() if parameter.grad is None]:
            torch._foreach_zero_(fresh)
        for parameter, own in self._others.items():
            if parameter.grad is not None and parameter.grad is not own:
                own.copy_(parameter.grad)
            parameter.grad = own

    def _dtype(self) -> torch.dtype:
        kind = self._device.type
        weight: torch.Tensor = self._decoder.norm.weight
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class CudaRecorder:
    """Records CUDA graphs, whose memory is one pool: none runs while another does."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(own)
        # Not torch.cuda.graph: it collects the host's garbage each time, which takes longer than what is recorded.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                work()
            finally:
                graph.capture_end()
        own.wait_stream(self._stream)
        replay: Work = graph.replay
        return replay


class _Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, anchor: torch.Tensor) -> torch.Tensor:
        graph.forward()
        ctx.graph = graph
        return graph.hidden.view_as(graph.hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.graph.gradient.copy_(gradient)
        ctx.graph.backward()
        return None, None


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
