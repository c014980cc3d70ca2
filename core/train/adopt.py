"""Take over an adapter that peft trained elsewhere: checked, measured and written as a job's result. By hand:

    python -m core.train.adopt FOLDER BASE OUT --model NAME [--weights DIGEST] [--quantization Q] [--precision P] [--texts FILE]

What can't be proven to compute here what it computed there is refused with all reasons: pickled weights, options that change
the base or more than linear modules, keys without a place. The parity record is measured with peft itself, on the operator's
texts or a few that stand below, so an endpoint is held to peft's numbers. Only the operator's command calls it
(`store/imports.py`), in a process of its own, since that one knows no torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.adapter import ADAPTER_KIND, PARITY_FILE, AdapterFacts, ParityRecord, Quantization
from core.data.template import ChatTemplate, choose_template
from core.data.tokenizer import Tokenizer
from core.errors import ArtifactError, InvalidInput, Problem, StropError, UserError
from core.eval.probes import Known
from core.manifest import closed_folder
from core.models.adapt import ADAPTER_WEIGHTS, CHAT_TEMPLATE_FILE, load_adapter, save_tokenizer
from core.models.canonical import CONFIG_FILE, beyond_lora, check_keys, read_config
from core.models.load import DTYPES, LoadedBase, Precision, load_base, pick_device
from core.train.parity import PROBE_TOKENS, PROBES, measure_loaded

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Question: What is 17 times 23?\nAnswer: 17 times 23 is 391.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Dear Ms. Alvarez,\n\nthank you for your letter of 4 March. We are glad to confirm your booking.",
    "Die Grenzen meiner Sprache bedeuten die Grenzen meiner Welt.",
    "La vie est un sommeil, l'amour en est le rêve.",
    "人工智能正在改变我们的生活方式。",
    '{"name": "widget", "price": 12.5, "tags": ["small", "blue"], "in_stock": true}',
)
"""Probes where the operator gives none: prose, sums, code, a letter, other languages, JSON."""

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adopt(
    folder: Path,
    base: LoadedBase,
    base_folder: Path,
    output: Path,
    texts: Sequence[str] = TEXTS,
) -> AdapterFacts:
    """Write the adapter in `folder` to `output` as a job's result: canonical, with its parity record, closed.

    `base` is loaded from `base_folder`, and is changed. Raises InvalidInput with every reason why it can't be taken over,
    ArtifactError for files that can't be read.
    """
    config = _read_config(folder)
    tokenizer, template = _speech(folder, base_folder, texts)
    check_keys(base.model, folder, tuple(config["modules_to_save"] or ()))
    facts = AdapterFacts(
        tuning="lora",
        base=base.identity,
        job_id=None,
        attempt=0,
        step=0,
        rank=max([config["r"], *config["rank_pattern"].values()]),
        template=template.digest,
        eval_loss=None,
    )
    closing = facts.model_dump(mode="json")
    with closed_folder(output, ADAPTER_KIND, closing) as draft:
        config |= {"base_model_name_or_path": base.identity.model, "inference_mode": True}
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
        _write_weights(folder, draft, base)
        save_tokenizer(base_folder, draft, template.source)
        record = _measure(load_adapter(base.model, draft, "saved"), base, tokenizer, template, texts)
        closing["parity"] = record.summary().model_dump(mode="json")
        (draft / PARITY_FILE).write_text(record.model_dump_json(indent=1))
    return facts


def _read_config(folder: Path) -> dict[str, Any]:
    """peft's config, every entry of which is understood. Raises InvalidInput with all that is not."""
    problems = []
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = [path.name for path in folder.glob("adapter_model.*")]
        why = f"{', '.join(pickles)} is a pickle, which is never read: save it as safetensors" if pickles else "is missing"
        problems.append(Problem("no-weights", f"{ADAPTER_WEIGHTS}: {why}"))
    try:
        config = read_config(folder)
    except ArtifactError as error:
        raise InvalidInput(str(error), problems) from None
    if config["peft_type"] != "LORA":
        raise InvalidInput(f"{folder.name}: {CONFIG_FILE} does not describe LoRA (peft_type)", problems)
    for name, value in beyond_lora(config).items():
        if name != "modules_to_save":
            problems.append(Problem("unsupported-option", f"{CONFIG_FILE}: {name} is {value!r}, which is not reproduced here"))
    if config["task_type"] not in ("CAUSAL_LM", None):
        problems.append(Problem("unsupported-option", f"{CONFIG_FILE}: task_type is {config['task_type']!r}, not CAUSAL_LM"))
    if str(config["init_lora_weights"]).startswith(_CHANGES_THE_BASE):
        way = config["init_lora_weights"]
        message = f"{CONFIG_FILE}: init_lora_weights is {way!r}, which changes the base: have peft convert it to LoRA on saving"
        problems.append(Problem("unsupported-option", message))
    if problems:
        raise InvalidInput(f"{folder.name} can't be taken over", problems)
    return config


def _speech(folder: Path, base_folder: Path, texts: Sequence[str]) -> tuple[Tokenizer, ChatTemplate]:
    """The base's tokenizer, and the adapter's template where it brings one. Raises InvalidInput for another tokenizer."""
    tokenizer = Tokenizer.from_folder(base_folder)
    if (folder / "tokenizer.json").is_file():
        theirs = Tokenizer.from_folder(folder)
        for text in texts:
            if theirs.encode(text, parse_special=True)[0] != tokenizer.encode(text, parse_special=True)[0]:
                raise InvalidInput(f"{folder.name}: its tokenizer gives other ids than the base's, as for {text[:40]!r}")
        if theirs.chat_template is not None:
            return tokenizer, ChatTemplate("model", theirs.chat_template)
    elif (folder / CHAT_TEMPLATE_FILE).is_file():
        return tokenizer, ChatTemplate("model", (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8"))
    return tokenizer, choose_template("model", tokenizer)


def _write_weights(folder: Path, draft: Path, base: LoadedBase) -> None:
    # As the loader holds them, so that it finds in memory what lies in the file: LoRA in fp32, whole modules as the base.
    dtype = DTYPES[base.identity.compute_dtype]
    try:
        stored = load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ArtifactError(f"{folder.name}/{ADAPTER_WEIGHTS} can't be read: {error}") from None
    tensors = {name: tensor.to(torch.float32 if ".lora_" in name else dtype) for name, tensor in stored.items()}
    if wrong := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise InvalidInput(f"{folder.name}: {wrong[0]} holds numbers that are not finite")
    save_file(tensors, draft / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _measure(
    model: PeftModel, base: LoadedBase, tokenizer: Tokenizer, template: ChatTemplate, texts: Sequence[str]
) -> ParityRecord:
    sequences: list[Known] = []
    for text in texts[:PROBES]:
        ids = tokenizer.encode(text, parse_special=True)[0][:PROBE_TOKENS]
        if len(ids) > 1:
            sequences.append((ids, 1))
    if not sequences:
        raise InvalidInput("No text has two tokens, so there is nothing to measure the adapter on")
    record = measure_loaded(model, "saved", sequences, base.identity, tokenizer, template.digest)
    if all(module.rms == 0 for module in record.modules):
        raise InvalidInput("The adapter adds nothing to its base, so nothing would show that it is loaded")
    return record


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m core.train.adopt", description="Take over an adapter of peft.")
    for name in ("folder", "base", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--model", required=True, help="the base's registered name")
    parser.add_argument("--weights", required=True, help="the base's registered digest")
    parser.add_argument("--quantization", choices=get_args(Quantization), default="none")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--allow-remote-code", action="store_true", help="the model was registered so")
    parser.add_argument("--texts", type=Path, help="a file with a text a line, to measure on instead of the built-in ones")
    given = parser.parse_args(arguments)
    try:
        lines = given.texts.read_text(encoding="utf-8").splitlines() if given.texts else TEXTS
        _read_config(given.folder)  # before gigabytes are loaded
        base = load_base(
            given.base,
            name=given.model,
            weights=given.weights,
            quantization=given.quantization,
            precision=given.precision,
            device=pick_device(given.device),
            allow_remote_code=given.allow_remote_code,
        )
        facts = adopt(given.folder, base, given.base, given.out, [line for line in lines if line.strip()])
    except UserError as error:
        print("\n".join([error.detail, *(f"  {problem.message}" for problem in error.problems)]), file=sys.stderr)  # noqa: T201
        return 1
    except (StropError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    print(f"{given.folder.name}: rank {facts.rank} on {facts.base}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
