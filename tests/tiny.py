"""A tiny random model with a real byte-level BPE tokenizer, built on disk without a network.

Two layers, width 64: a training step takes milliseconds, and every code path is the one real models take.
Torch is imported inside the functions, so that tests of torch-free houses can import this module.
"""

import importlib
import shutil
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REMOTE_CODE = Path(__file__).parent / "remote_code"
"""Code of a model that transformers doesn't know."""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
    "Write a short poem about the sea and the wind. Give three tips for staying healthy. Add 12 and 30: the sum is 42.",
    "system user assistant instruction input response question answer translate the sentence into another language",
]


def build_tiny_model(
    folder: Path, *, family: str = "llama", seed: int = 0, layers: int = 2, hidden: int = 64, **settings: Any
) -> Path:
    """Write a model folder (config, fp32 safetensors, tokenizer with ChatML template) and return it.

    `family` is a model_type, `settings` are further entries of its config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    eos, pad = _write_tokenizer(folder)
    shape = {
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | settings))
    model.save_pretrained(folder)
    return folder


def build_remote_code_model(folder: Path, *, seed: int = 0) -> Path:
    """The same for the toy in tests/remote_code, which brings its code along as auto_map tells."""
    import torch

    eos, pad = _write_tokenizer(folder)
    modeling = importlib.import_module("tests.remote_code.modeling_toy_glm")
    torch.manual_seed(seed)
    model = modeling.ToyGLMForConditionalGeneration(modeling.ToyGLMConfig(eos_token_id=eos, pad_token_id=pad))
    model.post_init()
    model.config.auto_map = {
        "AutoConfig": "configuration_toy_glm.ToyGLMConfig",
        "AutoModelForCausalLM": "modeling_toy_glm.ToyGLMForConditionalGeneration",
    }
    model.save_pretrained(folder)
    for path in REMOTE_CODE.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def _write_tokenizer(folder: Path) -> tuple[int, int]:
    """(id that ends a turn, id of padding)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return special.index("<|im_end|>"), special.index("<|pad|>")


def build_tiny_clip(folder: Path, *, seed: int = 0, hidden: int = 32, side: int = 32, patch: int = 8, layers: int = 2) -> Path:
    """A CLIP model folder: two small random towers, a byte-level tokenizer, an image processor that crops to `side` pixels."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start, end = "<|startoftext|>", "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[start, end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    tower = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = tower | {"vocab_size": 400, "max_position_embeddings": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": side, "patch_size": patch}, projection_dim=hidden)
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    return folder
