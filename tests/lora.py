"""LoRA adapters on a tiny model, made with peft directly, for tests of loading and serving.

Torch is imported inside the functions, so that tests of torch-free houses can import this module.
"""

import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def add_lora(model_folder: Path, folder: Path, seed: int, *, scale: float = 0.3, rank: int = 4) -> Path:
    """Write an adapter whose weights are random and large enough to change greedy answers; `scale` 0 does nothing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (scale if "lora_B" in name else 0.3)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    copy_tokenizer(model_folder, folder)
    return folder


def copy_tokenizer(model_folder: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)


def fresh_answer(model: Any, prompt_ids: list[int], max_new_tokens: int) -> tuple[list[int], list[float]]:
    """(ids, log-probabilities) of transformers' own greedy `generate`: what the engine must equal."""
    import torch

    out = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = out.sequences[0, len(prompt_ids) :].tolist()
    tables = [torch.log_softmax(logits[0].float(), -1) for logits in out.logits]
    return ids, [float(table[token]) for table, token in zip(tables, ids, strict=True)]
