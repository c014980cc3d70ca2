"""LoRA adapters on a tiny model, made with peft directly, for tests of loading and serving.

Torch is imported inside the functions, so that tests of torch-free houses can import this module.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def add_lora(
    model_folder: Path, folder: Path, seed: int, *, scale: float = 0.3, rank: int = 4, targets: Any = TARGETS, **options: Any
) -> Path:
    """Write an adapter whose weights are random and large enough to change greedy answers; `scale` 0 does nothing. `options`
    are peft's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (scale if "lora_B" in name else 0.3)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    copy_tokenizer(model_folder, folder)
    return folder


def teach_lora(model_folder: Path, folder: Path, rows: Sequence[tuple[list[int], list[int]]], **options: Any) -> Path:
    """Write an adapter, `options` being peft's, trained until its greedy answer to each prompt begins with its ids."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=1e-2)
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.tensor([prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in rows])
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    wanted = labels[:, 1:]
    for _ in range(200):
        logits = adapted(ids).logits[:, :-1]
        others = logits.scatter(-1, wanted.clamp(min=0)[..., None], -torch.inf).amax(-1)
        lead = logits.gather(-1, wanted.clamp(min=0)[..., None])[..., 0] - others
        if lead[wanted != -100].min() > 0.1:  # the logits of a tiny random model are all within 1
            adapted.save_pretrained(str(folder), save_embedding_layers=False)
            copy_tokenizer(model_folder, folder)
            return folder
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("it was not learnt in 200 steps")


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
