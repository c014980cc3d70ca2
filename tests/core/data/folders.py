"""The tokenizers of the test data as model folders: the files that real models ship, turned into tokenizer.json.

Only their words are read here; the rules beside them (how text is split, what is put before it) are those of the model the
words come from, as `transformers` has them.
"""

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REAL = ("clip", "bert-base-uncased", "bert-base-chinese", "mistral-v1", "mistral-v3", "qwen")
_QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer(name: str, source: Path, folder: Path) -> Path:
    """Write the tokenizer `name` of the folder `source` as a model folder, and return it."""
    from transformers import BertTokenizer, CLIPTokenizer, LlamaTokenizer

    if name == "clip":
        CLIPTokenizer.from_pretrained(source / name).save_pretrained(folder)
    elif name.startswith("bert"):
        BertTokenizer(str(source / name / "vocab.txt")).save_pretrained(folder)
    elif name.startswith("mistral"):
        pieces = list(_sentencepiece((source / name / "tokenizer.model").read_bytes()))
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        skip = {piece for piece, kind in pieces if kind != 1}
        ranks = {piece: number for piece, number in vocabulary.items() if piece not in skip}
        control = [piece for piece, kind in pieces if kind == 3 and piece not in ("<s>", "</s>")]
        merges = _merges(ranks, str)
        made = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, extra_special_tokens=control)
        made.save_pretrained(folder)
    else:
        _qwen(source / name / "qwen.tiktoken").save_pretrained(folder)
    return folder


def _qwen(path: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    ranks = {base64.b64decode(word): int(rank) for word, rank in map(str.split, path.read_text().splitlines())}

    def written(word: bytes) -> str:
        return "".join(letters[byte] for byte in word)

    vocabulary = {written(word): rank for word, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary, _merges(ranks, written), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens(marks)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _merges(ranks: dict[Any, int], written: Any) -> list[tuple[str, str]]:
    """The pairs that make up each word, in the order of the words' ranks."""
    merges = []
    for word in sorted(ranks, key=ranks.__getitem__):
        halves = [(word[:at], word[at:]) for at in range(1, len(word)) if word[:at] in ranks and word[at:] in ranks]
        halves.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written(first), written(second)) for first, second in halves]
    return merges


def _sentencepiece(content: bytes) -> Iterator[tuple[str, int]]:
    """(piece, type) of a SentencePiece model: field 1 of the message, in which field 1 is the text and field 3 the type."""
    for number, value in _fields(content):
        if number == 1:
            fields = dict(_fields(value))
            yield fields[1].decode(), fields.get(3, 1)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields, in order (the wire format of protobuf.dev)."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        value: Any
        if key & 7 == 0:
            value, at = _varint(content, at)
        elif key & 7 == 2:
            length, at = _varint(content, at)
            value, at = content[at : at + length], at + length
        else:
            size = 8 if key & 7 == 1 else 4
            value, at = struct.unpack_from("<d" if size == 8 else "<f", content, at)[0], at + size
        yield key >> 3, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
