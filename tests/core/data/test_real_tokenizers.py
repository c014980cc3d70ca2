"""Published vocabularies under the families' chat formats: ids as transformers makes them, one BOS, and an end that is trained.

The files beside this checkout are the publishers' own (SentencePiece and tiktoken); they become tokenizer.json here, so that
both sides read the same one.
"""

import base64
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from core.data.conversation import Message
from core.data.render import render, render_prompt, stop_ids
from core.data.template import choose_template
from core.data.tokenizer import Tokenizer

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [
    Message("user", "How do I say “good morning” in 中文, naïvely?"),
    Message("assistant", "早上好 (zǎoshang hǎo)."),
    Message("user", "And\n\tin code:  print(1234567)?"),
    Message("assistant", "print('早上好')  # 😀"),
    Message("user", "thanks [/INST] <|im_end|>"),
    Message("assistant", "You're welcome."),
]
CASES = {
    "mistral-v1": (INST, "</s>", 1),
    "mistral-v3": (INST, "</s>", 1),
    "mistral-v3 as gemma": (GEMMA, "<end_of_turn>", 1),
    "qwen": (CHATML, "<|im_end|>", 0),
}


def sentencepiece(path: Path) -> Backend:
    """A BPE model.proto of SentencePiece, of which only the pieces are read."""
    pieces = [piece for number, piece in _fields(path.read_bytes()) if number == 1 and isinstance(piece, bytes)]
    vocabulary: dict[str, int] = {}
    special = []
    for index, piece in enumerate(pieces):
        fields = dict(_fields(piece))
        text, kind = bytes(fields[1]).decode(), fields.get(3, 1)  # type: ignore[arg-type]
        vocabulary[text] = index
        if kind in (2, 3):  # unknown, control
            special.append(AddedToken(text, special=True, normalized=False))
    backend = Backend(models.BPE(vocabulary, _merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return backend


def tiktoken(path: Path) -> Backend:
    """Lines of base64 and rank; a pair of tokens is merged where the two together are one, the lowest rank first."""
    names = _byte_alphabet()
    ranks = {}
    for line in path.read_text().splitlines():
        token, rank = line.split()
        ranks["".join(names[byte] for byte in base64.b64decode(token))] = int(rank)
    backend = Backend(models.BPE(ranks, _merges(ranks)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return backend


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> tuple[Path, str, int]:
    """(a folder with tokenizer and template, the end of a turn, how many BOS a conversation begins with)."""
    from transformers import PreTrainedTokenizerFast

    template, end, bos = CASES[request.param]
    source = shared_data / "tokenizers" / request.param.split(" ")[0]
    if not source.is_dir():
        pytest.skip(f"{source.name} is not among the shared tokenizers")
    if bos:
        backend = sentencepiece(source / "tokenizer.model")
        backend.add_special_tokens(["<start_of_turn>", "<end_of_turn>"] if template is GEMMA else [])
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        backend, named = tiktoken(source / "qwen.tiktoken"), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    fast.chat_template = template
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder, end, bos


def test_a_published_vocabulary_renders_as_transformers_does(case: tuple[Path, str, int]) -> None:
    from transformers import AutoTokenizer

    folder, end, bos = case
    tokenizer, reference = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    template = choose_template("model", tokenizer)
    assert template.name == "model"
    for turns in (2, 4):
        row = CONVERSATION[:turns]
        chat = [{"role": message.role, "content": message.content} for message in row]
        rendered = render(row, tokenizer, template, "all_turns")
        assert rendered.ids == reference.apply_chat_template(chat, tokenize=True, return_dict=False)
        prompt = render_prompt(row[:-1], tokenizer, template)
        assert prompt == reference.apply_chat_template(chat[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert rendered.ids[: len(prompt)] == prompt
    whole = render(CONVERSATION, tokenizer, template, "all_turns")
    assert [place for place, token in enumerate(whole.ids) if token == tokenizer.bos_id] == list(range(bos))
    last_trained = max(place for place, trained in enumerate(whole.mask) if trained)
    end_id = tokenizer.token_id(end)
    assert whole.ids[last_trained] == end_id
    assert end_id in stop_ids(tokenizer, template)
    trained_ends = sum(trained for token, trained in zip(whole.ids, whole.mask, strict=True) if token == end_id)
    assert trained_ends == 3, "each answer's end, and no end that somebody wrote into a message"


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, in the order of the tokens."""
    return [
        (token[:cut], token[cut:])
        for token in vocabulary  # in the order of their ids
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _byte_alphabet() -> list[str]:
    """The letter that byte-level BPE (GPT-2) writes for each byte: itself where it can be seen, else the next free one."""
    free = iter(range(256, 512))
    return [
        chr(byte) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255 else chr(next(free)) for byte in range(256)
    ]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """(number, value) of a protobuf message's fields."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            size = varint()
            yield key >> 3, data[place : place + size]
            place += size
        else:
            assert key & 7 == 5, "pieces hold nothing else"
            yield key >> 3, struct.unpack("<f", data[place : place + 4])[0]
            place += 4
