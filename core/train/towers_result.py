"""The adapter folder of a model of two towers: plain LoRA for peft, or a plain model folder for transformers.

Beside the weights lie the files of tokenizer and image processor, and training.json. There is no parity record: no endpoint
serves it yet. Instead the folder is read back before it is closed, and must give the features that the trained model gave.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel

from core.adapter import ADAPTER_KIND, AdapterFacts, tolerance
from core.errors import ArtifactError
from core.manifest import closed_folder
from core.models.adapt import load_adapter, save_full, save_lora, save_processor, save_tokenizer, saved_rank
from core.models.canonical import check_keys
from core.models.load import DTYPES, load_base
from core.run import RunInput
from core.train.contrast import Contrast, features
from core.train.pairs import PairChunks
from core.train.training import Training

TRAINING_FILE = "training.json"
_PROBES = 16


def write_towers(
    training: Training, contrast: Contrast, run: RunInput, folder: Path, *, step: int, eval_loss: float | None
) -> None:
    """Write and close the folder. Casts a whole model to the compute dtype in place. Raises ArtifactError where what was
    written, read back, gives other features."""
    is_adapter = isinstance(training.model, PeftModel)
    facts = AdapterFacts(
        task="contrastive",
        tuning="lora" if is_adapter else "full",
        base=training.base,
        job_id=run.job_id,
        attempt=run.attempt,
        step=step,
        rank=saved_rank(training.model) if is_adapter else None,
        template="",
        eval_loss=eval_loss,
    )
    training.drop_optimizer()
    with closed_folder(folder, ADAPTER_KIND, facts.model_dump(mode="json")) as draft:
        if is_adapter:
            trained = _features(training, contrast, training.model)
            save_lora(training.model, draft)
            check_keys(training.model.get_base_model(), draft)
            load_adapter(training.model, draft, "saved")
            training.model.set_adapter("saved")
            read_back = _features(training, contrast, training.model)
        else:
            save_full(training.model, draft, DTYPES[training.base.compute_dtype])
            trained = _features(training, contrast, training.model)
            fresh = load_base(
                draft,
                name=run.spec.base_model,
                weights=training.base.weights,
                quantization="none",
                precision=training.base.compute_dtype,
                device=training.device,
                task="contrastive",
            )
            read_back = _features(training, contrast, fresh.model)
        apart = float((trained - read_back).abs().max())
        if not apart <= tolerance(training.base.compute_dtype):
            raise ArtifactError(f"the result, read back, gives features up to {apart:.3g} away from the trained model's")
        save_tokenizer(run.model_folder, draft, None)
        save_processor(run.model_folder, draft)
        (draft / TRAINING_FILE).write_text(json.dumps(run.spec.model_dump(mode="json"), indent=1, sort_keys=True))


def _features(training: Training, contrast: Contrast, model: object) -> torch.Tensor:
    """Of a few pairs, pictures' and captions' one below the other."""
    pairs = (training.rows.eval_rows or training.rows.step_rows(1))[:_PROBES]
    layout = PairChunks(training.layout.rows if isinstance(training.layout, PairChunks) else 1)
    with training.adapters_uncast():
        found = features(model, pairs, layout, training.device, normalisation=contrast.normalisation, compute=training.compute)
    return torch.cat([found.images, found.texts])
