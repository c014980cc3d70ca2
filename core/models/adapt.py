"""What is trained on top of a base, how it is written down, and how it is read back.

Adapters are peft's, with fp32 weights over whatever dtype the base has; full tuning writes a plain model folder. Whatever the
tuning, an adapter folder holds plain LoRA (arXiv 2106.09685; DoRA, 2402.09353, where that was asked for): the ways to start
(`start.py`) and MoRA (`mora.py`) are written as the LoRA they equal. Nothing here trains or generates. Walk of a job: attach
after `load_base`, save when the loop has ended; the endpoint calls `load_adapter` with the same folder.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.catalog import task_of
from core.errors import ArtifactError, BadSpec
from core.model_folder import PROCESSOR_FILES, TOKENIZER_FILES
from core.models import mora, start
from core.models.embeddings import TIED_WARNING, embedding_paths, install_embeddings, trained_modules
from core.models.targets import architecture_of, find_targets, leaf, peft_pattern
from core.spec import LoraTuning, MoraTuning
from core.tuning import Shapes, match_patterns, mora_size, tuning_problems

ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
PREFIX = "base_model.model."
"""What peft puts before a module's path in the keys of an adapter's weights."""
_TRAINED = "default"


def attach_adapter(model: Any, tuning: LoraTuning | MoraTuning, model_name: str, *, within: Sequence[str] = ("",)) -> PeftModel:
    """Put a trainable fp32 adapter on a frozen base, which computes what it did until the first step.

    It stands on modules under the paths `within` alone, whatever has the same names elsewhere.

    Raises BadSpec for target names that are no linear module of the model, for patterns that match none of the targets or
    contradict each other, and for a rank that the asked start can't have.
    """
    targets = find_targets(model, tuning.target_modules, within)
    shapes = {path: (module.in_features, module.out_features) for path, module in targets.items()}
    if problems := tuning_problems(tuning, shapes):
        raise BadSpec("; ".join(f"tuning.{str(problem.pointer).split('/')[2]}: {problem.message}" for problem in problems))
    if isinstance(tuning, MoraTuning):
        return _attach_mora(model, tuning, shapes, model_name)
    ranks = dict.fromkeys(shapes, tuning.rank) | match_patterns(tuning.rank_pattern, shapes)[0]
    alphas = dict.fromkeys(shapes, tuning.alpha) | match_patterns(tuning.alpha_pattern, shapes)[0]
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        rank_pattern=peft_pattern(ranks, tuning.rank),
        alpha_pattern=peft_pattern(alphas, tuning.alpha),
        lora_dropout=tuning.dropout,
        target_modules=_named(model, shapes),
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        modules_to_save=embedding_paths(model, "tuning.train_embeddings") if tuning.train_embeddings else None,
        bias="none",
        task_type=None if task_of(architecture_of(model)) == "contrastive" else "CAUSAL_LM",
    )
    adapted = _wrapped(model, config, model_name)
    if tuning.init != "default":
        for _, layer in _layers(adapted):
            start.install_start(layer, _TRAINED, tuning.init)
    if tuning.train_embeddings:
        install_embeddings(adapted, _TRAINED)
    return adapted


def saved_rank(model: PeftModel) -> int:
    """Largest rank in the folder that `save_lora` will write."""
    return max(_rank(layer) for _, layer in _layers(model))


def save_lora(model: PeftModel, folder: Path) -> None:
    """Write the adapter as plain LoRA in peft's format: adapter_config.json and fp32 adapter_model.safetensors.

    Embedding and head, where they were trained, are written in the base's dtype.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=_TRAINED, save_embedding_layers=False)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in _layers(model):
        down, up = as_lora(layer, _TRAINED)
        alphas[path] = _alpha(layer)
        ranks[path] = _rank(layer)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = down
        tensors[f"{PREFIX}{path}.lora_B.weight"] = up
    for path, wrapper in trained_modules(model.get_base_model()).items():
        for name, original in wrapper.original_module.named_parameters(prefix=PREFIX + path):
            tensors[name] = tensors[name].to(original.dtype)
    # A copy each: the format refuses shared memory, and a tied embedding stands under two names.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[_TRAINED].to_dict()
    rank, alpha = max(ranks.values()), max(alphas.values())
    config |= {"r": rank, "rank_pattern": peft_pattern(ranks, rank)}
    config |= {"lora_alpha": alpha, "alpha_pattern": peft_pattern(alphas, alpha)}
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


def save_tokenizer(model_folder: Path, folder: Path, chat_template: str | None) -> None:
    """Copy the tokenizer's files and write the template that was trained with, if any, which a loader prefers to any other."""
    for name in TOKENIZER_FILES:
        if name != CHAT_TEMPLATE_FILE and (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(chat_template)


def save_processor(model_folder: Path, folder: Path) -> None:
    """Copy what says how a picture becomes pixels."""
    for name in PROCESSOR_FILES:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)


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
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{folder.name}/{ADAPTER_WEIGHTS} can't be read: {error}") from None
    device = str(base_model.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # below it is an error
        warnings.filterwarnings("ignore", message=TIED_WARNING)
        try:
            if isinstance(base_model, PeftModel):
                adapted = base_model
                adapted.load_adapter(str(folder), adapter_name=adapter_name, is_trainable=False, torch_device=device)
            else:
                adapted = PeftModel.from_pretrained(
                    base_model, str(folder), adapter_name=adapter_name, is_trainable=False, torch_device=device
                )
        except KeyError as error:
            raise ArtifactError(f"{folder.name}: the adapter's config asks for {error}, which is not in the file") from None
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


def as_lora(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of one of peft's LoRA layers: `layer.scaling` times B·A is what the adapter adds to its weight."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(down, mora.SharedSquare):
        return mora.as_lora(down, up)
    if isinstance(down, start.Down):
        return start.as_lora(down, up)
    return down.weight.detach(), up.weight.detach()


def unwrap(model: Any) -> None:
    """Take every adapter out of a plain model: what is left is its bare base, frozen, in eval mode."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            setattr(model.get_submodule(parent), name, module.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False)
    model.eval()


def _attach_mora(model: Any, tuning: MoraTuning, shapes: Shapes, model_name: str) -> PeftModel:
    sizes = {path: mora_size(inputs, outputs, tuning.rank) for path, (inputs, outputs) in shapes.items()}
    largest = max(sizes.values())
    pattern = peft_pattern(sizes, largest)
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=pattern,  # alpha = rank everywhere: a scale of 1
        target_modules=list(dict.fromkeys(map(leaf, shapes))),
        bias="none",
        task_type="CAUSAL_LM",
    )
    # Without memory: LoRA of so high a rank would take many times what the squares do that replace it.
    adapted = _wrapped(model, config, model_name, low_cpu_mem_usage=True)
    for _, layer in _layers(adapted):
        mora.install_square(layer, _TRAINED, tuning.rank)
    return adapted


def _named(model: Any, targets: Shapes) -> list[str]:
    """What peft is told of the targets: the last part of their paths, or their paths where others have the same last part.

    peft takes a name for all modules whose path ends with it.
    """
    names = dict.fromkeys(map(leaf, targets))
    meant = [path for path, _ in model.named_modules() if leaf(path) in names]
    return list(names) if set(meant) == set(targets) else list(targets)


def _wrapped(model: Any, config: LoraConfig, model_name: str, **options: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TIED_WARNING)
        adapted = get_peft_model(model, config, adapter_name=_TRAINED, autocast_adapter_dtype=True, **options)
    # peft fills in the path the base was loaded from; a result names its base, never a folder of the machine.
    config.base_model_name_or_path = model_name
    return adapted


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """(path in the plain model, LoRA layer) of every module that the trained adapter stands on."""
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and _TRAINED in module.lora_A:
            yield path, module


def _rank(layer: Any) -> int:
    rank: int = layer.r[_TRAINED]
    return 2 * rank if isinstance(layer.lora_A[_TRAINED], start.Down) else rank


def _alpha(layer: Any) -> float:
    """What makes a folder that holds `_rank` and the pair of `as_lora` scale as the layer does."""
    alpha: float = layer.lora_alpha[_TRAINED]
    if isinstance(layer.lora_A[_TRAINED], start.Down):  # at twice the rank; the scale is alpha / rank, or / sqrt(rank)
        return alpha * (2**0.5 if layer.use_rslora[_TRAINED] else 2)
    return alpha
