"""What is trained on top of a base, how it is written down, and how it is read back.

LoRA (arXiv 2106.09685) by peft with fp32 adapter weights over whatever dtype the base has; full tuning writes a plain model
folder. Nothing here trains or generates. Walk of a job: attach after `load_base`, save when the loop has ended; the
endpoint calls `load_adapter` with the same folder.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from core.catalog import FAMILIES
from core.errors import ArtifactError, BadSpec
from core.model_folder import TOKENIZER_FILES
from core.spec import LoraTuning

ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_TRAINED = "default"


def attach_lora(model: Any, tuning: LoraTuning, model_name: str) -> PeftModel:
    """Put trainable fp32 adapters on a frozen base. Raises BadSpec for target names that are no linear module of it."""
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=_target_modules(model, tuning),
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    # peft fills in the path the base was loaded from; a result names its base, never a folder of the machine.
    config.base_model_name_or_path = model_name
    return adapted


def save_lora(model: PeftModel, folder: Path) -> None:
    """Write the adapter in peft's format: adapter_config.json and fp32 adapter_model.safetensors."""
    tensors = get_peft_model_state_dict(model, adapter_name=_TRAINED, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config = model.peft_config[_TRAINED].to_dict()
    config["inference_mode"] = True
    for name, value in config.items():
        if isinstance(value, set):
            config[name] = sorted(value)  # a set's order differs between processes, and the folder's digest with it
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def save_full(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a plain model folder in `dtype`. Casts the model's parameters in place: it is the end of their training.

    Only parameters are cast: a rotary table is a buffer that every loader keeps in fp32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.config._name_or_path = ""
    model.save_pretrained(folder)


def save_tokenizer(model_folder: Path, folder: Path, chat_template: str) -> None:
    """Copy the tokenizer's files and write the template that was trained with, which a loader prefers to any other."""
    for name in TOKENIZER_FILES:
        if name != CHAT_TEMPLATE_FILE and (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)
    (folder / CHAT_TEMPLATE_FILE).write_text(chat_template)


def load_adapter(base_model: Any, folder: Path, adapter_name: str) -> PeftModel:
    """Read an adapter folder onto its base, frozen; on a PeftModel it becomes one more adapter, not the active one.

    `adapter_name` becomes a module name and so holds no dot. Raises ArtifactError unless every tensor of the file stands in
    the model, bit for bit, and every adapter weight of the model came from the file: an adapter that loads in part answers
    fluently and wrongly.
    """
    if "." in adapter_name:
        raise ValueError(f"adapter_name {adapter_name!r} holds a dot")
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ArtifactError(f"{folder.name}: no {ADAPTER_WEIGHTS}")
    device = str(base_model.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # below it is an error
        if isinstance(base_model, PeftModel):
            adapted = base_model
            adapted.load_adapter(str(folder), adapter_name=adapter_name, is_trainable=False, torch_device=device)
        else:
            adapted = PeftModel.from_pretrained(
                base_model, str(folder), adapter_name=adapter_name, is_trainable=False, torch_device=device
            )
    stored = load_file(path)
    loaded = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
    missing = sorted(set(loaded) - set(stored))
    unmatched = sorted(set(stored) - set(loaded))
    changed = sorted(n for n in set(stored) & set(loaded) if not torch.equal(stored[n], loaded[n].detach().to("cpu")))
    if missing or unmatched or changed:
        adapted.delete_adapter(adapter_name)
        raise ArtifactError(
            f"{folder.name}: {len(stored)} adapter tensors; {len(unmatched)} match no module of the base, "
            f"{len(missing)} of the model's are not in the file, {len(changed)} differ after loading"
            f" (first: {(unmatched + missing + changed)[0]})"
        )
    return adapted


def _target_modules(model: Any, tuning: LoraTuning) -> list[str]:
    linear: set[str] = set()
    other: set[str] = set()
    for path, module in model.named_modules():
        (linear if isinstance(module, torch.nn.Linear) else other).add(path.rpartition(".")[2])
    if tuning.target_modules == "all-linear":
        architecture = model.config.architectures[0]
        names = list(FAMILIES[architecture].linear_modules)
    else:
        names = list(dict.fromkeys(tuning.target_modules))
    if not names:
        raise BadSpec("tuning.target_modules: the list is empty")
    wrong = [name for name in names if name not in linear]
    if wrong:
        reasons = ", ".join(f"{n} (not linear)" if n in other else f"{n} (not there)" for n in wrong)
        raise BadSpec(f"tuning.target_modules: {reasons}; linear modules of this model: {', '.join(sorted(linear))}")
    return names
