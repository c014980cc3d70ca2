"""TRL's SFTTrainer over strop's rows: `python trl_sft.py HANDOVER_FOLDER`, run by an environment of its own.

Imports nothing of strop. `benchmarks.peer` writes the folder and reads peer.json, which this leaves there. TRL does all that
a trainer does: its collator, loss, accumulation, clipping, optimizer and, in the case `own_schedule`, its learning rates.
Taken over are the tokens, their order (`train_sampling_strategy="sequential"`) and the adapter's first weights, which chance
would decide otherwise; in the case `matched` the learning rates too. The held-out loss is measured by plain transformers:
one row at a time without padding, in a model loaded anew with the adapter that TRL saved.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

IGNORED = -100
VERSIONS = ("trl", "transformers", "peft", "accelerate", "torch", "datasets", "tokenizers")
DEFAULTS = (
    "assistant_only_loss",
    "bf16",
    "completion_only_loss",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "num_train_epochs",
    "optim",
    "packing",
    "per_device_train_batch_size",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
)
"""What a user who names none of it gets."""


def main(folder: Path) -> None:
    handover = json.loads((folder / "handover.json").read_text())
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(handover["model"])
    untouched = SFTConfig(str(folder / "none"), use_cpu=True)
    found: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "defaults": {name: plain(value) for name in DEFAULTS for value in [getattr(untouched, name)]},
        "pad_token": tokenizer.pad_token,
        "rows": own_rows(handover, tokenizer, folder),
        "held_out_before": held_out_loss(handover, folder / "adapter"),
        "cases": {},
    }
    for case in handover["cases"]:
        found["cases"][case] = train(handover, case, tokenizer, folder)
        (folder / "peer.json").write_text(json.dumps(found, indent=1))


def train(handover: dict[str, Any], case: str, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """One run from the handed adapter on: its log, seconds, and held-out loss by TRL's own evaluation and by ours."""
    model = PeftModel.from_pretrained(load_base(handover), folder / "adapter", is_trainable=True)
    trainer = Peer(
        model=model,
        args=config(handover, folder),
        train_dataset=as_dataset(handover["train"]),
        eval_dataset=as_dataset(handover["held_out"]),
        processing_class=tokenizer,
    )
    trainer.rates = handover["learning_rates"] if case == "matched" else None
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    steps = [{name: entry[name] for name in ("step", "loss", "grad_norm", "learning_rate")} for entry in logged(trainer)]
    own_loss = trainer.evaluate()["eval_loss"]
    trainer.model.save_pretrained(folder / case)
    return {
        "steps": steps,
        "seconds": seconds,
        "held_out_own": own_loss,
        "held_out_after": held_out_loss(handover, folder / case),
    }


class Peer(SFTTrainer):
    """SFTTrainer; where `rates` is set, step n is taken at `rates[n - 1]`."""

    rates: list[float] | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.rates is None:
            return super().create_scheduler(num_training_steps, optimizer)
        factors = [rate / self.args.learning_rate for rate in self.rates]
        factors.append(0.0)  # asked for once more behind the last step
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factors.__getitem__)
        return self.lr_scheduler


def config(handover: dict[str, Any], folder: Path) -> SFTConfig:
    optim, schedule = handover["optim"], handover["schedule"]
    return SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=handover["steps"],
        per_device_train_batch_size=handover["micro_batch_size"],
        gradient_accumulation_steps=handover["gradient_accumulation_steps"],
        learning_rate=optim["learning_rate"],
        weight_decay=optim["weight_decay"],
        adam_beta1=optim["beta1"],
        adam_beta2=optim["beta2"],
        adam_epsilon=optim["epsilon"],
        max_grad_norm=optim["max_grad_norm"],
        lr_scheduler_type=schedule["kind"],
        warmup_steps=schedule["warmup_steps"],
        seed=handover["seed"],
        max_length=handover["max_length"],
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        # The arithmetic is compared in fp32 on a CPU; recomputation would change nothing but the time.
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def logged(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry and "grad_norm" in entry]


def load_base(handover: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(handover["model"], dtype=torch.float32)


@torch.no_grad()
def held_out_loss(handover: dict[str, Any], adapter: Path) -> float:
    """Nats per trained token over all held-out rows."""
    model = PeftModel.from_pretrained(load_base(handover), adapter).eval()
    nats = tokens = 0.0
    for ids, mask in handover["held_out"]:
        row = torch.tensor([ids])
        wanted = torch.tensor(mask[1:]).bool()
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        nats += cross_entropy(logits[wanted].float(), row[0, 1:][wanted], reduction="sum").item()
        tokens += int(wanted.sum())
    return nats / tokens


def own_rows(handover: dict[str, Any], tokenizer: Any, folder: Path) -> dict[str, int]:
    """TRL's own preparation of the same conversations, beside the rows that strop made of them, both uncut."""
    prompts = [
        {"prompt": messages[:-1], "completion": messages[-1:]} for messages in (entry["messages"] for entry in handover["all"])
    ]
    arguments = SFTConfig(str(folder / "none"), max_length=None, use_cpu=True, bf16=False, report_to="none")
    prepared = SFTTrainer(load_base(handover), arguments, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer)
    counts = {"rows": 0, "other_ids": 0, "trained_only_by_trl": 0, "trained_only_by_strop": 0}
    for ours, theirs in zip(handover["all"], prepared.train_dataset, strict=True):
        ids, mask = ours["row"]
        counts["rows"] += 1
        if theirs["input_ids"] != ids:
            counts["other_ids"] += 1
            continue
        pairs = [(label != IGNORED, bool(trained)) for label, trained in zip(theirs["labels"], mask, strict=True)]
        counts["trained_only_by_trl"] += pairs.count((True, False))
        counts["trained_only_by_strop"] += pairs.count((False, True))
    return counts


def as_dataset(rows: list[tuple[list[int], list[int]]]) -> Dataset:
    labels = [[token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)] for ids, mask in rows]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": labels})


def plain(value: Any) -> Any:
    return getattr(value, "value", value)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
