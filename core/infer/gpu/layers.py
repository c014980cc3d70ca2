"""The layers of a Llama-like model for packed steps: few kernels, few passes over memory, and nothing that a graph can't hold.

A decode layer is ten launches: norm with the sum before it, queries-keys-values, turn with the writing of keys and values,
attention and its join, output, norm, gate-up, gate, down; an adapter adds two a matrix product. For 32 rows of an 8B model in
bf16 the weights are 15.0 GB, 5.0 ms at the 3.0 TB/s that an H100 gives; 320 launches at 2 us, in a graph, of which half hide
behind the products, are 0.3 to 0.6 ms; keys and values of 256 tokens a row 1.1 GB, 0.35 ms; the head's logits 8 MB.

Weights of modules that read one input become one matrix, of which the modules' own are views: nothing is held twice, and peft
finds its modules as they were.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from core.infer.gpu.elementwise import embed, gate, norm, turn
from core.infer.gpu.step import DeviceStep
from core.models.families import FAMILIES, projections_of, why_not_fused
from core.models.joined import Dense, why_not_one


@dataclass(frozen=True)
class _Matrix:
    """A site: its number among all, its joined weight and bias."""

    number: int
    weight: torch.Tensor
    bias: torch.Tensor | None

    def multiply(self, x: torch.Tensor, step: DeviceStep) -> torch.Tensor:
        if step.adapters is None:
            return linear(x, self.weight, self.bias)
        return step.adapters.multiply(self.number, x, self.weight, self.bias)


@dataclass(frozen=True)
class _Layer:
    number: int
    mixed: _Matrix
    output: _Matrix
    gate_up: _Matrix
    down: _Matrix
    first_scale: torch.Tensor
    second_scale: torch.Tensor
    after_attention: torch.Tensor | None
    after_gate: torch.Tensor | None
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    scaling: float


class FusedModel:
    """A causal LM of transformers, computed by own kernels. `groups` are its sites, in the order of their numbers."""

    def __init__(self, model: Any, reach: int) -> None:
        """`reach` is how many positions there are. Raises ValueError where `why_not` has a reason."""
        if reason := why_not(model):
            raise ValueError(reason)
        family, decoder = FAMILIES[model.config.model_type], model.get_decoder()
        paths = {id(module): path for path, module in model.named_modules()}
        config = model.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._is_paired = family.paired
        self.groups: list[list[tuple[str, Any]]] = []

        def matrix(modules: list[Any]) -> _Matrix:
            self.groups.append([(paths[id(module)], module) for module in modules])
            bias = None if modules[0].bias is None else Dense([module.bias for module in modules]).joined
            return _Matrix(len(self.groups) - 1, Dense([module.weight for module in modules]).joined, bias)

        self._layers = []
        for number, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            norms = (attention.q_norm, attention.k_norm) if family.head_norms else None
            mixed, output, gate_up, down = (matrix(modules) for modules in projections_of(layer, family))
            self._layers.append(
                _Layer(
                    number,
                    mixed,
                    output,
                    gate_up,
                    down,
                    layer.input_layernorm.weight,
                    layer.post_attention_layernorm.weight,
                    layer.post_self_attn_layernorm.weight if family.norms_after else None,
                    layer.post_mlp_layernorm.weight if family.norms_after else None,
                    None if norms is None else (norms[0].weight, norms[1].weight, norms[0].variance_epsilon),
                    attention.scaling,
                )
            )
        self._width = decoder.layers[0].self_attn.head_dim
        self._embedding = model.get_input_embeddings().weight
        self._head = model.get_output_embeddings()
        self._last_scale, self._epsilon = decoder.norm.weight, decoder.norm.variance_epsilon
        device, dtype = self._embedding.device, self._embedding.dtype
        tables = decoder.rotary_emb(torch.empty(0, dtype=dtype, device=device), torch.arange(reach, device=device)[None])
        self._cosines, self._sines = (table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)

    def hidden(self, step: DeviceStep) -> torch.Tensor:
        """[T, H]: what the head is asked about each token."""
        stream, plus, after = embed(step.ids, step.drawn, self._embedding), None, None
        for layer in self._layers:
            x = norm(stream, plus, layer.first_scale, self._epsilon, after)
            mixed = layer.mixed.multiply(x, step)
            keys, values = step.store.at(layer.number, self._kv_heads, self._width, like=mixed)
            query = turn(
                mixed,
                keys,
                values,
                self._cosines,
                self._sines,
                step.positions,
                step.written,
                heads=self._heads,
                is_paired=self._is_paired,
                norms=layer.head_norms,
            )
            attended = torch.empty_like(query)
            step.attend(attended, query, layer.number, layer.scaling)
            plus = layer.output.multiply(attended.flatten(1), step)
            x = norm(stream, plus, layer.second_scale, self._epsilon, layer.after_attention)
            plus = layer.down.multiply(gate(layer.gate_up.multiply(x, step)), step)
            after = layer.after_gate
        return norm(stream, plus, self._last_scale, self._epsilon, after)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H]."""
        return self._head.weight

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[N, H] -> [N, V], in `out` where that is given."""
        if self._head.bias is None:
            return torch.mm(hidden, self._head.weight.t(), out=out)
        return torch.addmm(self._head.bias, hidden, self._head.weight.t(), out=out)


def why_not(model: Any) -> str | None:
    """What keeps a model from being computed so, in a few words; None where nothing does."""
    if reason := why_not_fused(model):
        return reason
    family = FAMILIES[model.config.model_type]
    for group in (group for layer in model.get_decoder().layers for group in projections_of(layer, family)):
        if reason := why_not_one(group):
            return reason
        if type(group[0]) is not torch.nn.Linear:
            return f"its weights are kept in a {type(group[0]).__name__}"
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        return "its parameters have more than one dtype"
    return None
