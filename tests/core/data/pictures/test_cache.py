"""The picture cache: whatever pictures go in, in whatever order and number, their pixels come out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data.pictures.archive import Member
from core.data.pictures.cache import PIXELS_FILE, ROWS_FILE, PictureCache, write_picture_cache
from core.data.pictures.decode import decode_picture
from core.data.pictures.resize import ResizeRule
from core.errors import ArtifactError, InvalidInput
from tests.core.data.pictures.draw import noise, saved

RULE = ResizeRule(8, (8, 8))


def write(folder: Path, members: list[Member], rule: ResizeRule = RULE, wanted: list[str] | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    write_picture_cache(folder, members, list(enumerate(wanted or [member.name for member in members], start=1)), rule, facts)
    return facts


@pytest.mark.parametrize("seed", range(25))
def test_round_trip_of_any_pictures(seed: int, tmp_path: Path) -> None:
    """Random numbers of pictures of random sizes and formats, some equal, under random rules."""
    random = np.random.default_rng(seed)
    rule = [ResizeRule(None), ResizeRule(7), ResizeRule((5, 9)), ResizeRule(6, (8, 4)), ResizeRule(None, square=(1, 2, 3))][
        seed % 5
    ]
    members: list[Member] = []
    for number in range(int(random.integers(0, 12))):
        if members and random.random() < 0.3:
            data = members[int(random.integers(len(members)))].data
        else:
            height, width = random.integers(1, 30, 2)
            data = saved(noise(seed * 100 + number, height, width), str(random.choice(["PNG", "JPEG", "BMP"])))
        members.append(Member(f"d/{number}", data))
    wanted = [member.name for member in members if random.random() < 0.8]
    facts: dict[str, Any] = {"kept": seed}
    held = write_picture_cache(tmp_path / "c", members, list(enumerate(wanted, start=1)), rule, facts)
    cache = PictureCache.open(tmp_path / "c")
    assert cache.rows[:, 0].tolist() == list(range(1, len(wanted) + 1))
    index_of = dict(zip(wanted, cache.rows[:, 1].tolist(), strict=True))
    files = {member.name: member.data for member in members}
    assert len(cache) == held == len({files[name] for name in wanted}) == cache.facts["pictures"]
    assert cache.facts["kept"] == seed
    assert cache.facts["rule"] == json.loads(json.dumps(rule.facts()))
    for name in wanted:
        pixels = cache.picture(index_of[name])
        assert np.array_equal(pixels, rule.apply(decode_picture(files[name], name).image))
        assert pixels.shape[:2] == tuple(cache.sizes[index_of[name]])
    for name in wanted:
        for other in wanted:
            assert (index_of[name] == index_of[other]) == (files[name] == files[other])
            one, two = index_of[name], index_of[other]
            same = cache.picture(one).shape == cache.picture(two).shape and np.array_equal(cache.picture(one), cache.picture(two))
            assert (bytes(cache.digests[one]) == bytes(cache.digests[two])) == same


def test_pictures_are_views_that_nobody_writes_to(tmp_path: Path) -> None:
    write(tmp_path / "c", [Member(str(seed), saved(noise(seed))) for seed in range(4)])
    cache = PictureCache.open(tmp_path / "c")
    with pytest.raises(ValueError, match="read-only"):
        cache.picture(3)[:] = 0
    with pytest.raises(IndexError):
        cache.picture(4)


def test_every_bad_and_missing_picture_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    members = [Member("a.png", b"no"), Member("b.png", saved(noise(0))), Member("c.png", saved(noise(1))[:-40])]
    with pytest.raises(InvalidInput) as error:
        write(tmp_path / "c", members, wanted=["a.png", "b.png", "c.png", "gone.png"])
    for part in ("a.png: not a picture", "c.png: can't be decoded", "gone.png: not in the archive"):
        assert part in error.value.detail
    assert list(tmp_path.iterdir()) == []


def test_a_bad_file_twice_is_refused_under_both_names(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as error:
        write(tmp_path / "c", [Member("a", b"no"), Member("b", b"no")])
    assert "a: not" in error.value.detail
    assert "b: not" in error.value.detail


def test_a_changed_or_unfinished_cache_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", [Member("a", saved(noise(0)))])
    path = tmp_path / "c" / PIXELS_FILE
    sound = path.read_bytes()
    path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    with pytest.raises(ArtifactError, match=r"pixels\.bin: content differs"):
        PictureCache.open(tmp_path / "c")
    path.write_bytes(sound + b"\0")
    with pytest.raises(ArtifactError):
        PictureCache(tmp_path / "c", {})
    path.write_bytes(sound)
    np.save(tmp_path / "c" / ROWS_FILE, np.array([[1, 1]]))
    with pytest.raises(ArtifactError, match="do not belong together"):
        PictureCache(tmp_path / "c", {})
