"""The adapter folder: what a finished run leaves behind, whole or not at all.

Weights in the format their loader expects (peft for LoRA, transformers for a full model), tokenizer files, the chat template
that was trained with, training.json (the spec) and parity.json, closed by a manifest whose facts bind it to its base.
Nothing here is published: the supervisor verifies the folder and does that.
"""

import json
from pathlib import Path

from peft import PeftModel

from core.adapter import ADAPTER_KIND, PARITY_FILE, AdapterFacts
from core.data.template import choose_template
from core.data.tokenizer import Tokenizer
from core.manifest import closed_folder
from core.models.adapt import save_full, save_lora, save_tokenizer, saved_rank
from core.models.load import DTYPES
from core.run import RunInput
from core.train.build import Training
from core.train.parity import measure_full, measure_lora, probe_sequences
from core.train.tier import plain_attention

TRAINING_FILE = "training.json"


def write_result(training: Training, run: RunInput, folder: Path, *, step: int, eval_loss: float | None) -> None:
    """Write and close the adapter folder. The end of the training: full weights are cast to the compute dtype in place."""
    tuning = run.spec.tuning
    template = choose_template(run.spec.data.template, Tokenizer.from_folder(run.model_folder))
    facts = AdapterFacts(
        tuning=tuning.kind,
        base=training.base,
        job_id=run.job_id,
        attempt=run.attempt,
        step=step,
        rank=saved_rank(training.model) if isinstance(training.model, PeftModel) else None,
        template=template.digest,
        eval_loss=eval_loss,
    )
    training.drop_optimizer()
    examples = training.rows.eval_rows or [training.rows.first_row()]
    sequences = probe_sequences([example.sequences[0] for example in examples])
    with plain_attention(training.model), closed_folder(folder, ADAPTER_KIND, facts.model_dump(mode="json")) as draft:
        if isinstance(training.model, PeftModel):
            save_lora(training.model, draft)
            record = measure_lora(training.model, draft, sequences, training.base)
        else:
            save_full(training.model, draft, DTYPES[training.base.compute_dtype])
            record = measure_full(training.model, run.model_folder, sequences, training.base)
        save_tokenizer(run.model_folder, draft, template.source)
        (draft / TRAINING_FILE).write_text(json.dumps(run.spec.model_dump(mode="json"), indent=1, sort_keys=True))
        (draft / PARITY_FILE).write_text(record.model_dump_json(indent=1))
