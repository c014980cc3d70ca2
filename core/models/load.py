"""Bring a base model into memory: the one loader of training, held-out evaluation and serving.

Both sides of the seam call `load_base`, so the weights an adapter was trained on and those it is served on get the same
dtypes, the same quantisation and the same attention. It knows nothing about adapters (`adapt.py`) and never reaches a
network or a pickle, nor a model's own code unless it is told that the operator allows it (`remote_code.py`). Walk of a job:
the child's first heavy step, after the spec is read.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from core.adapter import BaseIdentity, Quantization
from core.catalog import Task, attention_kind, task_of
from core.errors import BadSpec
from core.models.fp8 import Linear8bit, check_8bit, to_8bit
from core.models.remote_code import check_remote_code, load_remote_code
from core.spec import Fp4Quantization, Nf4Quantization
from core.spec import Quantization as WantedQuantization

Precision = Literal["auto", "bf16", "fp16", "fp32"]
ComputeDtype = Literal["bf16", "fp16", "fp32"]

DTYPES: dict[ComputeDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base in eval mode on its device, and who it is."""

    model: Any
    identity: BaseIdentity
    device: torch.device


def load_base(
    model_folder: Path,
    *,
    name: str,
    weights: str,
    quantization: Quantization,
    precision: Precision,
    device: torch.device,
    allow_remote_code: bool = False,
    task: Task = "causal_lm",
) -> LoadedBase:
    """Load a model folder with every parameter frozen, in eval mode.

    `name` and `weights` are what the registry holds; they go into the identity unchecked. With `quantization` the linear
    layers but the head are 4-bit (QLoRA, arXiv 2305.14314) or 8-bit (LLM.int8(), 2208.07339; fp8) and all else keeps the compute
    dtype: nothing is raised to fp32, which would double the memory of embeddings and head. `allow_remote_code` is the word of
    the model's registration, never of a spec. Raises BadSpec for a model that is not for the `task`, for a precision that the
    device lacks, for a model whose own code doesn't do what is needed of it, and for fp8 on a GPU without it.
    """
    _silence_libraries()
    compute = resolve_precision(precision, device)
    dtype = DTYPES[compute]
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device},
        "trust_remote_code": False,  # unset, transformers asks on stdin
        "use_safetensors": True,
        "local_files_only": True,
    }
    if quantization == "fp8":
        check_8bit(device, dtype)
        options["device_map"] = {"": torch.device("cpu")}
    elif quantization != "none":
        options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    if allow_remote_code:
        model = load_remote_code(model_folder, options)
    else:
        config = json.loads((model_folder / "config.json").read_text())
        architecture = (config.get("architectures") or ["unknown"])[0]
        if task_of(architecture) != task:
            raise BadSpec(f"{name} is a {architecture}, a model for task {task_of(architecture)}; what is asked for is {task}")
        loader = AutoModel if task == "contrastive" else AutoModelForCausalLM
        model = loader.from_pretrained(model_folder, attn_implementation=attention_kind(architecture, config), **options)
    if quantization == "fp8":
        to_8bit(model, device)
    _keep_cpu_gradients(model)
    model.requires_grad_(False)
    model.eval()
    if allow_remote_code:
        check_remote_code(model, name)
    identity = BaseIdentity(model=name, weights=weights, quantization=quantization, compute_dtype=compute)
    return LoadedBase(model, identity, device)


def quantization_name(wanted: WantedQuantization) -> Quantization:
    """What a spec asks for, by the name an identity uses."""
    if isinstance(wanted, Nf4Quantization):
        return "nf4-double" if wanted.double_quantization else "nf4"
    if isinstance(wanted, Fp4Quantization):
        return "fp4-double" if wanted.double_quantization else "fp4"
    return wanted.kind


def dequantized_weight(linear: torch.nn.Linear) -> torch.Tensor:
    """fp32 [outputs, inputs]: the weight of a linear layer, quantised or not, as its forward pass multiplies with it."""
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        weight = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        return weight.to(torch.float32)
    if isinstance(linear, bitsandbytes.nn.Linear8bitLt):
        # The scale of each row moves from the weight to the layer's state in the first forward pass.
        scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return linear.weight.data.to(torch.float32) * (scales.to(torch.float32)[:, None] * (1.0 / 127.0))
    if isinstance(linear, Linear8bit):
        return linear.matrix().dequantized()
    return linear.weight.detach().to(torch.float32, copy=True)


def resolve_precision(precision: Precision, device: torch.device) -> ComputeDtype:
    """What `auto` means on this device: bf16 where the hardware multiplies it, else fp32.

    A CPU without AVX512-BF16 or AMX emulates bf16 and is slower with it than in fp32, so it counts as lacking it. Raises
    BadSpec for fp16 on a CPU and for bf16 on a GPU older than Ampere.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if precision == "bf16" and not has_bf16:
            raise BadSpec(f"memory.precision: bf16 needs an Ampere GPU or newer, not {torch.cuda.get_device_name(device)}")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if precision == "fp16":
            raise BadSpec("memory.precision: fp16 needs a GPU; use auto, bf16 or fp32 on a CPU")
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return precision


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none. Raises BadSpec when a wanted GPU is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadSpec("device: a GPU was asked for and none is visible")
    use_cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda", 0) if use_cuda else torch.device("cpu")


def _bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, _, double = quantization.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double == "double",
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_cpu_gradients(model: Any) -> None:
    # bitsandbytes repacks a 4-bit weight for inference in the first eval-mode forward on a CPU with AVX512-BF16 and never
    # unpacks it: training then runs through a kernel without a gradient, silently and wrongly.
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _silence_libraries() -> None:
    # Progress bars and advice of the libraries would bury what a run's log is read for.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
