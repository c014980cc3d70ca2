"""A model of two towers: the features that each gives, and which of its parameters a job trains.

Features are unit vectors in fp32, whatever the towers compute in. The catalogue (`core.catalog.TWO_TOWERS`) names the modules.
"""

from typing import Any

import torch
from torch.nn.functional import normalize

from core.catalog import TWO_TOWERS, TwoTowers
from core.errors import BadSpec
from core.models.targets import architecture_of
from core.spec import FullTuning, ProjectionTuning

_ALWAYS_THE_LAST = 2
"""CLIP's configs of before transformers 4.31 name this as the end of a text; the end is then the largest id of a text."""


def towers_of(model: Any) -> TwoTowers:
    """The catalogue's entry of a plain model."""
    return TWO_TOWERS[architecture_of(model)]


def image_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Unit fp32 [B, D] of normalised pixels fp32 [B, 3, H, W]. `model` is the plain model, with adapters on it or not."""
    return normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)


def text_features(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Unit fp32 [B, D] of token ids int64 [B, T], each text with its end token, whatever after it.

    No mask is needed: a text's feature is taken at its end token, which sees nothing of what follows.
    """
    return normalize(model.get_text_features(input_ids=input_ids).pooler_output.float(), dim=-1)


def check_end_token(model: Any, end: int | None, name: str) -> None:
    """Raises BadSpec where the model would look for the end of a text elsewhere than the tokenizer puts it: its features would
    then be those of some other place, without a word."""
    config = model.config.text_config
    if config.eos_token_id == _ALWAYS_THE_LAST:
        fits = end == config.vocab_size - 1 or end == _ALWAYS_THE_LAST
    else:
        fits = end == config.eos_token_id
    if not fits:
        raise BadSpec(f"{name}: its tokenizer ends texts with id {end}, and its config says {config.eos_token_id}")


def choose_trained(model: Any, tuning: FullTuning | ProjectionTuning, *, locked: bool) -> None:
    """Have the tuning's parameters trained and no other; with `locked` none of what a picture goes through.

    The temperature is not among them: whether it learns is the objective's to say.
    """
    towers = towers_of(model)
    chosen = (*towers.image, *towers.text) if isinstance(tuning, FullTuning) else towers.projections
    for name in chosen:
        model.get_submodule(name).requires_grad_(not (locked and name in towers.image))
