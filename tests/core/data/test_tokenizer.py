"""The one tokenizer path gives the ids transformers gives, and streams text without half characters."""

import json
from pathlib import Path

import pytest
from tokenizers import processors

from core.data.tokenizer import TextStream, Tokenizer
from core.errors import ArtifactError

TEXTS = ["Hello, world!", "  two  spaces ", "第一行\n第二行", "😀 naïve\tcafé", "", "The quick brown fox<|im_end|>\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(tiny_folder: Path, tiny: Tokenizer, text: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_folder)
    ids, offsets = tiny.encode(text, parse_special=True)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    assert len(offsets) == len(ids)
    assert tiny.decode(ids, skip_special=False) == text


def test_special_tokens_are_read_from_the_folder(tiny: Tokenizer) -> None:
    assert tiny.named == {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    assert tiny.eos_ids == (tiny.token_id("<|im_end|>"),)
    assert tiny.pad_id == tiny.token_id("<|pad|>")
    assert (tiny.bos_id, tiny.adds_bos, tiny.vocab_size) == (None, False, 432)


def test_generation_config_adds_its_ends(variant) -> None:  # type: ignore[no-untyped-def]
    folder = variant()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 5]}))
    assert Tokenizer.from_folder(folder).eos_ids == (2, 1, 5)


def test_tokens_that_only_the_config_knows_are_added_as_transformers_adds_them(variant) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    folder = variant(bos_token={"__type": "AddedToken", "content": "<bos>", "special": True})
    mine, reference = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert mine.bos_id == reference.bos_token_id == 432
    assert mine.encode("<bos>x", parse_special=True)[0] == reference("<bos>x", add_special_tokens=False)["input_ids"]


def test_special_strings_are_ordinary_text_on_request(tiny: Tokenizer) -> None:
    ids, _ = tiny.encode("a<|im_end|>", parse_special=False)
    assert not set(ids) & set(tiny.special.values())
    assert tiny.encode("a<|im_end|>", parse_special=True)[0][-1] == tiny.eos_ids[0]
    assert tiny.decode(ids, skip_special=True) == "a<|im_end|>"


def test_offsets_are_not_moved_past_a_leading_space(variant) -> None:  # type: ignore[no-untyped-def]
    folder = variant(post_processor=lambda backend: processors.ByteLevel(trim_offsets=True))
    _, offsets = Tokenizer.from_folder(folder).encode("a  b", parse_special=True)
    assert offsets == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="can't be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", [*TEXTS, "混合 text with 😀😀 and 𝒳"])
def test_a_stream_gives_the_whole_text_in_whole_characters(tiny: Tokenizer, text: str) -> None:
    ids, _ = tiny.encode(text, parse_special=True)
    stream = TextStream(tiny, skip_special=False)
    pieces = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_a_stream_gives_up_on_bytes_that_make_no_character(tiny: Tokenizer) -> None:
    (first, *_), _ = tiny.encode("😀", parse_special=True)
    stream = TextStream(tiny)
    pieces = [stream.push(first) for _ in range(30)] + [stream.finish()]
    assert any(pieces[:-1])
    assert "".join(pieces) == tiny.decode([first] * 30, skip_special=True)


def test_a_stream_keeps_special_tokens_to_itself(tiny: Tokenizer) -> None:
    ids, _ = tiny.encode("Paris<|im_end|>", parse_special=True)
    stream = TextStream(tiny)
    assert "".join(map(stream.push, ids)) + stream.finish() == "Paris"
