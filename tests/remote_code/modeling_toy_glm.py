"""A toy in ChatGLM3's manner, written as code for transformers 4 was.

One fused query_key_value, a gate in dense_h_to_4h, rotary positions on half of each head in neighbouring pairs, an output layer
inside the base model, no `post_init`, no `logits_to_keep`, no `get_output_embeddings`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_toy_glm import ToyGLMConfig


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D]: the first half of D is rotated in pairs (0, 1), (2, 3), ..., the rest left alone."""
    width = x.shape[-1] // 2
    rates = 1e4 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = positions.to(torch.float32)[:, None] * rates
    even, odd = x[..., :width:2].float(), x[..., 1:width:2].float()
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., width:]], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config: ToyGLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.width = config.hidden_size // self.heads
        self.query_key_value = nn.Linear(config.hidden_size, (self.heads + 2 * self.groups) * self.width)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, past: Any) -> torch.Tensor:
        batch, length, _ = x.shape
        split = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        q, k, v = (
            part.view(batch, length, -1, self.width).transpose(1, 2) for part in self.query_key_value(x).split(split, dim=-1)
        )
        q, k = rotate(q, positions), rotate(k, positions)
        if past is not None:
            k, v = past.update(k, v, self.layer)
        seen = torch.arange(k.shape[2], device=x.device) <= positions[:, None]
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.dense(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ToyGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config: ToyGLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=1e-5)
        self.self_attention = SelfAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, past: Any) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x), positions, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class ToyGLMModel(PreTrainedModel):
    config_class = ToyGLMConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ToyGLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GLMBlock(config, layer) for layer in range(config.num_layers)])
        self.final_layernorm = nn.RMSNorm(config.hidden_size, eps=1e-5)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(before, before + input_ids.shape[1], device=input_ids.device)
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, positions, past_key_values)
        return self.final_layernorm(hidden)


class ToyGLMForConditionalGeneration(PreTrainedModel):
    config_class = ToyGLMConfig
    base_model_prefix = "transformer"

    def __init__(self, config: ToyGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ToyGLMModel(config)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        hidden = self.transformer(input_ids, past_key_values if use_cache else None)
        logits = self.transformer.output_layer(hidden)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
