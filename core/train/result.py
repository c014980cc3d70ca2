"""The adapter folder: what a finished run leaves behind, whole or not at all.

Weights in the format their loader expects: peft for LoRA, transformers for a full model and for an adapter trained with new
tokens, which is folded into its base. Tokenizer files, the chat template that was trained with, training.json (the spec) and
parity.json, closed by a manifest whose facts bind it to its base.
Nothing here is published: the supervisor verifies the folder and does that.
"""

import json
from pathlib import Path

from peft import PeftModel

from core.adapter import ADAPTER_KIND, PARITY_FILE, AdapterFacts
from core.data.template import choose_template
from core.manifest import closed_folder
from core.models.adapt import save_full, save_lora, save_tokenizer, saved_rank
from core.models.canonical import check_keys
from core.models.load import DTYPES
from core.models.merge import fold_trained
from core.run import RunInput
from core.train.fused.install import uninstall_fused
from core.train.parity import measure_full, measure_lora, probe_sequences
from core.train.tier import plain_attention
from core.train.towers_result import TRAINING_FILE, write_towers
from core.train.training import Training


def write_result(training: Training, run: RunInput, folder: Path, *, step: int, eval_loss: float | None) -> None:
    """Write and close the adapter folder. The end of the training: weights are folded and cast to the compute dtype in place."""
    if training.contrast is not None:
        write_towers(training, training.contrast, run, folder, step=step, eval_loss=eval_loss)
        return
    template = choose_template(run.spec.data.template, training.tokenizer)
    # An adapter for a vocabulary that its base doesn't have would fit no endpoint's base.
    is_adapter = isinstance(training.model, PeftModel) and not training.tokenizer.new
    facts = AdapterFacts(
        tuning=run.spec.tuning.kind if is_adapter else "full",
        base=training.base,
        job_id=run.job_id,
        attempt=run.attempt,
        step=step,
        rank=saved_rank(training.model) if is_adapter else None,
        template=template.digest,
        eval_loss=eval_loss,
    )
    training.drop_optimizer()
    if training.choice.tier == "fused":
        uninstall_fused(training.model)  # weights that are cast or folded would leave the joined matrices standing beside them
    examples = training.rows.eval_rows or [training.rows.first_row()]
    sequences = probe_sequences([example.sequences[0] for example in examples])
    closing = facts.model_dump(mode="json")
    with plain_attention(training.model), closed_folder(folder, ADAPTER_KIND, closing) as draft:
        if is_adapter:
            save_lora(training.model, draft)
            check_keys(training.model.get_base_model(), draft, tuple(training.model.peft_config["default"].modules_to_save or ()))
            record = measure_lora(training.model, draft, sequences, training.base, training.tokenizer, template.digest)
        else:
            plain = fold_trained(training.model) if isinstance(training.model, PeftModel) else training.model
            save_full(plain, draft, DTYPES[training.base.compute_dtype])
            record = measure_full(plain, run.model_folder, sequences, training.base, training.tokenizer, template.digest)
        save_tokenizer(run.model_folder, draft, template.source)
        training.tokenizer.save_new_tokens(draft)
        (draft / TRAINING_FILE).write_text(json.dumps(run.spec.model_dump(mode="json"), indent=1, sort_keys=True))
        closing["parity"] = record.summary().model_dump(mode="json")
        (draft / PARITY_FILE).write_text(record.model_dump_json(indent=1))
