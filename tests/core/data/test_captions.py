"""Captions as token rows: start and end stand whatever is cut, and a caption without a word is refused by its row."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from core.data.captions import check_caption_tokens, render_caption
from core.data.tokenizer import Tokenizer
from core.data.tokens import TokenCache
from core.errors import BadData, BadSpec, InvalidInput
from core.prepare import prepare_tokens
from core.run import TOKENS_FOLDER, TokenizeInput

VOCABULARY = {"<s>": 0, "</s>": 1, "[UNK]": 2, "a": 3, "dog": 4, "red": 5}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]", "pad_token": "</s>"}


def model_folder(folder: Path, named: dict[str, str] = NAMED, reads: int = 8) -> Path:
    """Of a CLIP of six words that reads `reads` tokens; no weights."""
    folder.mkdir()
    backend = Backend(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": {"max_position_embeddings": reads}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def request(work: Path, model: Path, rows: list[dict[str, Any]], max_length: int = 512) -> TokenizeInput:
    path = work / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TokenizeInput(
        dataset_id="ds_1",
        rows=path,
        model_folder=model,
        template="model",
        max_length=max_length,
        data_kind="picture_pair",
        train_on="everything",
    )


def test_a_caption_stands_between_start_and_end(tmp_path: Path) -> None:
    rendered = render_caption(" a red dog ", Tokenizer.from_folder(model_folder(tmp_path / "m")))
    assert (rendered.ids, rendered.mask) == ([0, 3, 5, 4, 1], [0, 1, 1, 1, 0])


def test_the_end_stays_where_a_caption_is_cut_at_what_the_model_reads(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "m", reads=5)
    long = {"row": 1, "image": "x", "captions": ["a red dog a red dog a red dog", "a dog"]}
    for asked, longest in ((512, 5), (4, 4)):
        work = tmp_path / str(asked)
        work.mkdir()
        prepare_tokens(request(work, model, [long], asked), work)
        cache = TokenCache.open(work / TOKENS_FOLDER)
        assert [cache.row(n)[0].tolist() for n in (0, 1)] == [[*[0, 3, 5, 4, 1][: longest - 1], 1], [0, 3, 4, 1]]
        assert cache.row_numbers.tolist() == [1, 1]
        assert (cache.facts["truncated_rows"], cache.facts["longest"], cache.facts["max_length"]) == (1, 11, longest)


def test_captions_of_special_tokens_alone_are_refused_by_row(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "m")
    rows = [{"row": n, "image": "x", "captions": [text]} for n, text in ((3, "a dog"), (7, "\N{SNOWMAN}"), (9, "blue"))]
    with pytest.raises(BadData) as error:
        prepare_tokens(request(tmp_path, model, rows), tmp_path)
    for part in ("2 of 3 rows", "row 7: the caption '\N{SNOWMAN}' has no word", "row 9"):
        assert part in str(error.value)
    with pytest.raises(InvalidInput, match="no word"):
        render_caption("  ", Tokenizer.from_folder(model))


def test_a_tokenizer_without_start_or_end_is_refused(tmp_path: Path) -> None:
    for number, missing in enumerate(("bos_token", "eos_token")):
        named = {name: token for name, token in NAMED.items() if name != missing}
        with pytest.raises(BadSpec, match="names no bos_token or no eos_token"):
            check_caption_tokens(Tokenizer.from_folder(model_folder(tmp_path / str(number), named)), "clip")
