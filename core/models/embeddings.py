"""Input embedding and output head trained in full beside an adapter, by peft's modules_to_save.

peft keeps the original next to a copy per adapter, so that the base stays whole. The copies train in fp32 over whatever dtype
the base has and are written in the base's dtype, as peft will hold them. Where the model ties the two, one matrix is trained
and written under both names: read back they are two equal copies, which any version of peft switches rightly (its own tying
fails for the second adapter that a model gets).
"""

from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from core.errors import BadSpec

TIED_WARNING = "Model has `tie_word_embeddings=True`"
"""How peft begins its advice to tie by itself."""


def embedding_paths(model: Any, field: str) -> list[str]:
    """Paths of a plain model's input embedding and output head, for the field of a spec that asks for them.

    Raises BadSpec where transformers can't name them.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    try:
        wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:
        wanted = [None]
    if any(id(module) not in paths for module in wanted):
        raise BadSpec(f"{field}: this model does not say which of its modules are embedding and head")
    return [paths[id(module)] for module in wanted]


def install_embeddings(adapted: PeftModel, adapter: str) -> None:
    """Make an adapter's copies trainable fp32 masters, one of them for both ends where the model ties these."""
    base = adapted.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    dtype = embedding.original_module.weight.dtype
    for wrapper in (embedding, head):
        copy = wrapper.modules_to_save[adapter]
        for name, parameter in list(copy.named_parameters()):  # some heads have a bias
            setattr(copy, name, torch.nn.Parameter(parameter.detach().to(torch.float32)))
    if head.original_module.weight is embedding.original_module.weight:
        head.modules_to_save[adapter].weight = embedding.modules_to_save[adapter].weight
    if dtype != torch.float32:
        # The layers in between go on in the dtype they have; what stays in fp32 is the matrices and their updates.
        embedding.modules_to_save[adapter].register_forward_hook(lambda module, inputs, output: output.to(dtype))
        head.modules_to_save[adapter].register_forward_pre_hook(_as_wide_as_the_weight)


def trained_modules(model: Any) -> dict[str, ModulesToSaveWrapper]:
    """Path -> wrapper of every module that adapters of a model bring whole."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def _as_wide_as_the_weight(head: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (hidden,) = inputs
    # Under autocast the product has the compute dtype anyway.
    if torch.is_autocast_enabled(hidden.device.type):
        return inputs
    return (hidden.to(head.weight.dtype),)
