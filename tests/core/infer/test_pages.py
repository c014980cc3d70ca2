"""Pages: nothing is lost, nothing is given twice, and a key finds only what was published under it."""

import random

import pytest

from core.infer.pages import Pages, chain_key, chain_root


def test_taken_pages_are_distinct_and_come_back() -> None:
    pages = Pages(4, 16)
    first, second = pages.take(3), pages.take(1)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pages.take(1) is None
    pages.give_back(first)
    assert pages.available == 3
    assert pages.take(4) is None, "and nothing is taken of what there is"
    assert pages.available == 3


def test_a_published_page_is_found_by_its_key_until_its_room_is_needed() -> None:
    pages = Pages(2, 2)
    (page,) = pages.take(1) or []
    key = chain_key(chain_root("tenant", "base", "adapter"), [7, 8])
    pages.publish(page, key)
    assert pages.find(key) == page
    pages.give_back([page])
    pages.give_back([page])
    assert pages.find(key) == page, "kept with no holder"
    assert pages.take(2) is None, "a found page is held"
    pages.give_back([page])
    assert len(pages.take(2) or []) == 2
    assert pages.find(key) is None


def test_the_end_of_a_chain_makes_room_before_its_beginning() -> None:
    pages = Pages(3, 1)
    held = pages.take(3) or []
    keys = [bytes([number]) for number in range(3)]
    for page, key in zip(held, keys, strict=True):
        pages.publish(page, key)
    pages.give_back(held)
    pages.take(1)
    assert [pages.find(key) is not None for key in keys] == [True, True, False]


@pytest.mark.parametrize(
    "other", [("a", "b", "d"), ("a", "x", "c"), ("x", "b", "c"), ("ab", "", "c"), ("a", "bc", ""), ("a", "b", "c", "")]
)
def test_whatever_decides_the_numbers_decides_the_key(other: tuple[str, ...]) -> None:
    assert chain_root(*other) != chain_root("a", "b", "c")
    assert chain_key(chain_root(*other), [1]) != chain_key(chain_root("a", "b", "c"), [1])
    assert chain_key(chain_root("a"), [1, 2]) != chain_key(chain_root("a"), [2, 1])


def test_holders_and_keys_stay_consistent_through_any_course() -> None:
    """4,000 random moves against a plain record of who holds what."""
    chance = random.Random(0)
    pages, count = Pages(12, 4), 12
    held: list[int] = []
    content: dict[bytes, int] = {}
    for number in range(4000):
        move = chance.random()
        if move < 0.4:
            wanted = chance.randint(1, 3)
            taken = pages.take(wanted)
            assert (taken is None) == (wanted > count - len(set(held)))
            for page in taken or []:
                assert page not in held
                content = {key: where for key, where in content.items() if where != page}
                held.append(page)
        elif move < 0.6 and held:
            page, key = chance.choice(held), number.to_bytes(4, "little")
            pages.publish(page, key)
            if page not in content.values():
                content[key] = page
        elif move < 0.7 and content:
            key = chance.choice(list(content))
            assert pages.find(key) == content[key]
            held.append(content[key])
        elif held:
            page = chance.choice(held)
            held.remove(page)
            pages.give_back([page])
        assert pages.available == count - len(set(held))
