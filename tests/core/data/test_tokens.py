"""The token cache gives back what was written, cut and counted, and refuses a folder that was tampered with."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.data.tokens import TOKENS_FILE, TokenCache, TokenRow, write_token_cache
from core.errors import ArtifactError
from core.manifest import verify_folder
from core.records import TokenCounts
from core.run import TOKEN_CACHE_KIND

ROWS = [
    TokenRow(1, [5, 6, 7], [0, 1, 1]),
    TokenRow(3, [1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1]),
    TokenRow(4, [9, 9, 9, 9, 9], [0, 0, 0, 0, 1]),
    TokenRow(7, [5, 6, 7], [0, 1, 1]),
    TokenRow(8, [5, 6, 7], [0, 0, 1]),
]


def test_rows_come_back_cut_counted_and_with_their_numbers(tmp_path: Path) -> None:
    counts = write_token_cache(tmp_path / "tokens", "ds_1", iter(ROWS), 4, {"template": "chatml"})
    cache = TokenCache.open(tmp_path / "tokens")
    assert [(cache.row(i)[0].tolist(), cache.row(i)[1].tolist()) for i in range(len(cache))] == [
        ([5, 6, 7], [0, 1, 1]),
        ([1, 2, 3, 4], [0, 0, 0, 1]),
        ([5, 6, 7], [0, 1, 1]),
        ([5, 6, 7], [0, 0, 1]),
    ]
    assert cache.row_numbers.tolist() == [1, 3, 7, 8]
    assert cache.lengths.tolist() == [3, 4, 3, 3]
    assert counts.model_dump() == {
        "dataset_id": "ds_1",
        "rows": 5,
        "examples": 4,
        "tokens": 13,
        "trained_tokens": 6,
        "truncated_rows": 2,
        "rows_without_target": 1,
        "longest": 6,
        "squared_tokens": 3 * 9 + 16,
    }
    assert cache.facts == {"template": "chatml", "group": 1} | counts.model_dump()
    assert [len(cache.example(i)) for i in range(len(cache))] == [1] * 4


def test_rows_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "tokens", "ds_1", ROWS, 10, {})
    ids, mask = TokenCache.open(tmp_path / "tokens").row(1)
    assert (ids.dtype, mask.dtype) == (np.int32, np.uint8)
    assert ids.base is not None
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1
    with pytest.raises(IndexError):
        TokenCache.open(tmp_path / "tokens").row(5)


def test_equal_rows_have_equal_digests_and_the_mask_counts(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "tokens", "ds_1", ROWS, 10, {})
    cache = TokenCache.open(tmp_path / "tokens")
    assert cache.row_digest(0) == cache.row_digest(3)
    assert len({cache.row_digest(i) for i in range(len(cache))}) == len(cache) - 1


def test_the_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "tokens", "ds_1", ROWS, 10, {})
    arrays = load_file(tmp_path / "tokens" / TOKENS_FILE)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "offsets": ("int64", (6,)),
        "row_numbers": ("int64", (5,)),
        "input_ids": ("int32", (20,)),
        "loss_mask": ("uint8", (20,)),
    }
    assert arrays["input_ids"].tolist() == [token for row in ROWS for token in row.ids]
    assert arrays["offsets"].tolist() == [0, 3, 9, 14, 17, 20]
    assert set(verify_folder(tmp_path / "tokens", TOKEN_CACHE_KIND)) > {"rows", "tokens"}
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["manifest.json", TOKENS_FILE]


def test_a_cache_without_rows_can_be_written_and_opened(tmp_path: Path) -> None:
    counts = write_token_cache(tmp_path / "tokens", "ds_1", ROWS[2:3], 4, {})
    assert (counts.rows, counts.rows_without_target, counts.longest) == (1, 1, 5)
    assert len(TokenCache.open(tmp_path / "tokens")) == 0


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "tokens", "ds_1", ROWS, 10, {})
    path = tmp_path / "tokens" / TOKENS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="content differs"):
        TokenCache.open(tmp_path / "tokens")


def test_a_row_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def rows():  # type: ignore[no-untyped-def]
        yield ROWS[0]
        raise RuntimeError("renderer")

    with pytest.raises(RuntimeError, match="renderer"):
        write_token_cache(tmp_path / "tokens", "ds_1", rows(), 10, {})
    assert list(tmp_path.iterdir()) == []


PAIRS = [
    TokenRow(1, [1, 2, 3], [0, 1, 1]),
    TokenRow(1, [1, 2, 4, 4, 4], [0, 1, 1, 1, 1]),
    TokenRow(2, [1, 2, 3], [0, 0, 1]),
    TokenRow(2, [1, 2, 4, 5, 6], [0, 0, 0, 0, 1]),
    TokenRow(5, [1, 2, 3, 4, 5], [0, 0, 1, 1, 1]),
    TokenRow(5, [1, 2, 4, 5, 6], [0, 0, 1, 1, 1]),
]


def test_a_pair_is_one_example_and_goes_whole_when_one_of_it_keeps_no_target(tmp_path: Path) -> None:
    counts = write_token_cache(tmp_path / "tokens", "ds_1", iter(PAIRS), 4, {}, group=2)
    cache = TokenCache.open(tmp_path / "tokens")
    assert (cache.group, len(cache), cache.facts["group"]) == (2, 2, 2)
    assert cache.row_numbers.tolist() == [1, 1, 5, 5]
    assert cache.lengths.tolist() == [3, 4, 4, 4]
    chosen, rejected = cache.example(0)
    assert (chosen[0].tolist(), chosen[1].tolist()) == ([1, 2, 3], [0, 1, 1])
    assert (rejected[0].tolist(), rejected[1].tolist()) == ([1, 2, 4, 4], [0, 1, 1, 1])
    assert [ids.tolist() for ids, _ in cache.example(1)] == [[1, 2, 3, 4], [1, 2, 4, 5]]
    assert [cache.row(place)[0].tolist() for place in (2, 3)] == [ids.tolist() for ids, _ in cache.example(1)]
    for beyond in (-1, 2):
        with pytest.raises(IndexError):
            cache.example(beyond)
    assert (counts.rows, counts.examples, counts.rows_without_target, counts.truncated_rows) == (3, 2, 1, 3)
    assert (counts.tokens, counts.trained_tokens, counts.longest) == (15, 9, 5)


@pytest.mark.parametrize("rows", [PAIRS[:3], [PAIRS[0], PAIRS[2]]])
def test_sequences_that_make_no_pairs_are_a_bug(tmp_path: Path, rows: list[TokenRow]) -> None:
    with pytest.raises(AssertionError, match="no group of 2"):
        write_token_cache(tmp_path / "tokens", "ds_1", rows, 4, {}, group=2)


def test_a_text_of_several_sequences_is_one_row_and_several_examples(tmp_path: Path) -> None:
    rows = [
        TokenRow(1, [1, 2, 3, 4], [0, 1, 1, 1]),
        TokenRow(1, [4, 5, 6, 7], [0, 1, 1, 1]),
        TokenRow(1, [7, 8], [0, 1]),
        TokenRow(2, [9], [0]),
        TokenRow(4, [1, 2], [0, 1]),
    ]
    counts = write_token_cache(tmp_path / "tokens", "ds_1", rows, 4, {})
    cache = TokenCache.open(tmp_path / "tokens")
    assert (counts.rows, counts.examples, counts.rows_without_target, counts.truncated_rows) == (3, 4, 1, 0)
    assert (len(cache), cache.row_numbers.tolist()) == (4, [1, 1, 1, 4])
    assert (counts.tokens, counts.trained_tokens, counts.longest) == (12, 8, 4)


def test_a_cache_and_counts_from_before_groups_are_read_as_single_sequences(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "tokens", "ds_1", ROWS, 10, {})
    path = tmp_path / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    facts = next(value for value in manifest.values() if isinstance(value, dict) and "group" in value)
    del facts["group"], facts["examples"]
    path.write_text(json.dumps(manifest))
    cache = TokenCache.open(tmp_path / "tokens")
    assert (cache.group, len(cache)) == (1, len(ROWS))
    assert TokenCounts.model_validate(cache.facts | {"rows_without_target": 2}).examples == len(ROWS) - 2
