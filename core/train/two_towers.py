"""A model of two towers made ready: what of it trains, the temperature, and what it says before it is trained.

The part of `core.train.build` that pairs alone need.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from core.data.pictures.normalise import Normalisation
from core.data.tokenizer import Tokenizer
from core.errors import BadData, BadSpec, InvalidInput
from core.models.adapt import attach_adapter
from core.models.towers import check_end_token, choose_trained, towers_of
from core.spec import FullTuning, InfoNceObjective, JobSpec, LoraTuning, ProjectionTuning
from core.train.batches import TrainingRows
from core.train.contrast import Contrast, features
from core.train.pairs import PairChunks
from core.vision.contrastive import log_scale_of


def build_contrast(
    base_model: Any,
    spec: JobSpec,
    model_folder: Path,
    tokenizer: Tokenizer,
    rows: TrainingRows,
    device: torch.device,
    compute: Callable[[], AbstractContextManager[Any]],
) -> tuple[Any, Contrast]:
    """(the model with its adapter or its trained parameters, the rest), of a base that is frozen and as it was.

    Raises BadSpec for a processor that can't be followed, an end token in doubt, and target modules that are not there, BadData
    for a single picture.
    """
    assert isinstance(spec.objective, InfoNceObjective)
    if rows.distinct_rows < 2:
        raise BadData("there is one picture to train on, and nothing to tell it from: two or more are needed")
    check_end_token(base_model, tokenizer.eos_ids[0] if tokenizer.eos_ids else None, spec.base_model)
    try:
        normalisation = Normalisation.of_model(model_folder)
    except InvalidInput as error:
        raise BadSpec(f"{spec.base_model}: {error.detail}") from None
    base = None
    if rows.eval_count:
        layout = PairChunks(spec.batch.rows_at_once)
        base = features(base_model, rows.eval_rows, layout, device, normalisation=normalisation, compute=compute)
    locked = spec.pictures is not None and spec.pictures.image_tower == "locked"
    model = _tuned(base_model, spec, locked=locked)
    return model, Contrast(normalisation, _log_scale(base_model, spec, spec.objective), base)


def _tuned(base_model: Any, spec: JobSpec, *, locked: bool) -> Any:
    if isinstance(spec.tuning, LoraTuning):
        return attach_adapter(base_model, spec.tuning, spec.base_model, within=towers_of(base_model).text if locked else ("",))
    assert isinstance(spec.tuning, FullTuning | ProjectionTuning)
    choose_trained(base_model, spec.tuning, locked=locked)
    return base_model


def _log_scale(base_model: Any, spec: JobSpec, objective: InfoNceObjective) -> torch.Tensor:
    """The model's own parameter, set to the asked temperature, where the result is a whole model; else a number beside it."""
    parameter = base_model.logit_scale
    start = parameter.detach().float().clone()
    if objective.temperature is not None:
        start.fill_(log_scale_of(objective.temperature))
    if isinstance(spec.tuning, LoraTuning):
        return start
    with torch.no_grad():
        parameter.copy_(start)
    parameter.requires_grad_(objective.learn_temperature is not False)
    scale: torch.Tensor = parameter
    return scale
