"""Config of the toy model, with ChatGLM3's names for what others call num_hidden_layers, vocab_size and intermediate_size."""

from typing import Any

from transformers import PretrainedConfig


class ToyGLMConfig(PretrainedConfig):
    model_type = "toy_glm"

    def __init__(
        self,
        num_layers: int = 2,
        padded_vocab_size: int = 512,
        hidden_size: int = 64,
        ffn_hidden_size: int = 96,
        num_attention_heads: int = 4,
        multi_query_group_num: int = 2,
        seq_length: int = 512,
        **kwargs: Any,
    ) -> None:
        self.num_layers = num_layers
        self.padded_vocab_size = padded_vocab_size
        self.vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.num_attention_heads = num_attention_heads
        self.multi_query_group_num = multi_query_group_num
        self.seq_length = seq_length
        super().__init__(**kwargs)
