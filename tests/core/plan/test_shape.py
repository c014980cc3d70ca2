"""The numbers of a decoder are those of its config, and what a job trains of it is counted from them."""

from core.plan.shape import model_shape, trainable_parameters
from tests.core.plan.jobs import LLAMA_7B, PARAMETERS_7B, spec

QWEN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


def test_the_shape_of_a_config_is_the_shape_of_the_model() -> None:
    shape = model_shape("Qwen3ForCausalLM", QWEN)
    assert shape.linear["q_proj"] == (64, 128)
    assert shape.linear["k_proj"] == (64, 64)
    assert shape.linear["o_proj"] == (128, 64)
    fused = model_shape("GlmForCausalLM", QWEN)
    assert fused.linear["gate_up_proj"] == (64, 256)
    assert "gate_proj" not in fused.linear
    assert model_shape("GemmaForCausalLM", QWEN).tied_embeddings
    assert not shape.tied_embeddings
    assert model_shape("Qwen3ForCausalLM", QWEN | {"tie_word_embeddings": True}).tied_embeddings


def test_trainable_parameters_are_counted_from_rank_and_targets() -> None:
    shape = model_shape("LlamaForCausalLM", LLAMA_7B)
    lora = {"kind": "lora", "rank": 8}
    q_and_v = trainable_parameters(spec(tuning=lora | {"target_modules": ["q_proj", "v_proj"]}), shape, PARAMETERS_7B)
    assert q_and_v == 4_194_304
    assert trainable_parameters(spec(tuning=lora), shape, PARAMETERS_7B) == 19_988_480
    assert trainable_parameters(spec(tuning={"kind": "full"}), shape, PARAMETERS_7B) == PARAMETERS_7B
