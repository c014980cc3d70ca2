"""Fold an adapter into its base: a plain model folder that any loader reads without peft. By hand:

    python -m core.models.merge BASE ADAPTER OUT [--dequantize] [--precision bf16|fp16|fp32]

What is folded into are the weights that the adapter was trained on. Those of a quantised base are its quantised ones, which
are not the originals: the result is then a full-size model with the quantised model's numbers (fp8's without the rounding of
what meets its weights), and is only made when asked for. Folded into the originals the adapter would be another model than the
one that was trained and evaluated.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from core.adapter import ADAPTER_KIND, AdapterFacts
from core.errors import InvalidInput, StropError
from core.manifest import closed_folder, folder_digest, verify_folder
from core.model_folder import MODEL_KIND, ModelFacts, read_model_facts
from core.models.adapt import CHAT_TEMPLATE_FILE, as_lora, load_adapter, save_full, save_tokenizer, unwrap
from core.models.load import DTYPES, ComputeDtype, dequantized_weight, load_base
from core.models.vocabulary import remove_rows

_ADAPTER = "merged"


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    output: Path,
    *,
    precision: ComputeDtype | None = None,
    dequantize: bool = False,
) -> ModelFacts:
    """Write the merged model with tokenizer and chat template to `output`, whole or not at all; returns what it is.

    Sums are in fp32 and weights are written in `precision` (None: what the adapter was computed in), on the CPU, with two
    copies of the model in memory. Raises InvalidInput for another base than the adapter's, for an adapter of a quantised base
    without `dequantize`, and for an output that exists; ArtifactError for a folder that differs from its manifest.
    """
    facts = AdapterFacts.model_validate(verify_folder(adapter_folder, ADAPTER_KIND))
    _check(facts, base_folder, adapter_folder, output, dequantize)
    compute = facts.base.compute_dtype
    adapted = _on_cpu(base_folder, facts, facts.base.quantization, compute)
    load_adapter(adapted, adapter_folder, _ADAPTER)
    plain = _on_cpu(base_folder, facts, "none", precision or compute)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(_folded(adapted, name, DTYPES[compute]))
    with closed_folder(output, MODEL_KIND, {"adapter": folder_digest(adapter_folder), "base": facts.base.weights}) as draft:
        save_full(plain, draft, DTYPES[precision or compute])
        save_tokenizer(adapter_folder, draft, (adapter_folder / CHAT_TEMPLATE_FILE).read_text())
    return read_model_facts(output)


def fold_trained(model: PeftModel) -> Any:
    """The plain model that a trained adapter makes of its base, in the base's place and dtype: the end of the training.

    The base is not quantised. What is added to its weights is added in fp32.
    """
    plain, adapter = model.get_base_model(), model.active_adapter
    remove_rows(plain)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                weight.copy_(_updated(module, weight.to(torch.float32), adapter))
            elif isinstance(module, ModulesToSaveWrapper):
                for name, parameter in module.modules_to_save[adapter].named_parameters():
                    module.original_module.get_parameter(name).copy_(parameter)
    unwrap(plain)
    return plain


def _check(facts: AdapterFacts, base_folder: Path, adapter_folder: Path, output: Path, dequantize: bool) -> None:
    if facts.tuning == "full":
        raise InvalidInput(f"{adapter_folder.name}: is a whole model already")
    if facts.base.quantization != "none" and not dequantize:
        raise InvalidInput(
            f"{adapter_folder.name}: was trained on {facts.base.quantization} weights and fits no others; to fold it into "
            "those, written out in full size, ask for --dequantize"
        )
    weights = read_model_facts(base_folder).weights
    if weights != facts.base.weights:
        raise InvalidInput(f"{base_folder.name}: its weights are {weights[:12]}; the adapter was trained on {facts.base}")
    if output.exists():
        raise InvalidInput(f"{output}: is there already")


def _on_cpu(folder: Path, facts: AdapterFacts, quantization: Any, precision: ComputeDtype) -> Any:
    loaded = load_base(
        folder,
        name=facts.base.model,
        weights=facts.base.weights,
        quantization=quantization,
        # A CPU does not compute in fp16, but nothing is computed here.
        precision="fp32" if precision == "fp16" else precision,
        device=torch.device("cpu"),
    )
    return loaded.model


def _folded(adapted: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A parameter of the plain model as the adapter makes it; `dtype` is what the base was held in."""
    path, _, leaf = name.rpartition(".")
    module = adapted.get_submodule(path)
    if isinstance(module, ModulesToSaveWrapper):
        return getattr(module.modules_to_save[_ADAPTER], leaf)
    inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if leaf != "weight" or not isinstance(inner, torch.nn.Linear):
        return getattr(inner, leaf).to(dtype)
    weight = dequantized_weight(inner).to(dtype).to(torch.float32)
    return _updated(module, weight, _ADAPTER) if isinstance(module, LoraLayer) else weight


def _updated(layer: Any, weight: torch.Tensor, adapter: str) -> torch.Tensor:
    """W + s·B·A; with DoRA (arXiv 2402.09353, equation 5) each row of that brought to its learned length."""
    down, up = as_lora(layer, adapter)
    weight = weight + layer.scaling[adapter] * (up @ down)
    if adapter in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector[adapter].weight
        weight = weight * (lengths / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m core.models.merge", description="Fold an adapter into its base.")
    for name in ("base", "adapter", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dequantize", action="store_true", help="fold into the quantised weights it was trained on")
    parser.add_argument("--precision", choices=get_args(ComputeDtype), help="of what is written; default: the adapter's")
    given = parser.parse_args(arguments)
    try:
        facts = merge_adapter(given.base, given.adapter, given.out, precision=given.precision, dequantize=given.dequantize)
    except StropError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    print(f"{given.out}: {facts.architecture}, {facts.parameters} parameters, weights {facts.weights[:12]}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
