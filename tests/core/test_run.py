"""The name of a token cache: what tokens depend on, and nothing else; and the name it always had."""

from typing import Any, get_args

import pytest

from core.run import token_key, wanted_tokens
from core.spec import (
    DATA_KINDS,
    DataKind,
    DatasetRef,
    DataSpec,
    DpoObjective,
    Objective,
    OrpoObjective,
    PlainTextObjective,
    SftObjective,
)


def key(objective: Objective, **data: Any) -> str:
    spec = DataSpec(datasets=[DatasetRef(dataset_id="ds_aaaaaaaaaaaa")], **{"max_length": 256} | data)
    return token_key("d" * 64, "t" * 64, spec, objective)


def test_conversations_keep_the_keys_under_which_their_tokens_lie_stored() -> None:
    assert key(SftObjective(train_on="last_turn")) == "7c38954c0d013f1f9d5aff5e6ff0c0eb49ed9103"
    assert key(SftObjective(train_on="all_turns")) == "e83b60cddba299202b61b3be205ba7080341e14a"


def test_objectives_that_train_the_same_tokens_share_them() -> None:
    shared = {key(DpoObjective()), key(DpoObjective(beta=0.5, loss="ipo")), key(OrpoObjective(beta=0.2))}
    assert len(shared) == 1
    others = [SftObjective(train_on=on) for on in ("last_turn", "all_turns", "everything")]
    assert len({*shared, key(PlainTextObjective()), *map(key, others)}) == 5
    assert key(PlainTextObjective(), max_length=255) != key(PlainTextObjective())


def test_every_objective_has_its_kind_of_rows() -> None:
    union, _ = get_args(Objective)
    assert [one.model_fields["kind"].default for one in get_args(union)] == list(DATA_KINDS)
    of_pictures = {"picture_pair", "picture_question", "picture_chat"}  # read and reported before objectives train on them
    assert set(DATA_KINDS.values()) | of_pictures == set(get_args(DataKind))


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (SftObjective(train_on="everything"), ("conversation", "everything")),
        (DpoObjective(), ("preference", "last_turn")),
        (OrpoObjective(), ("preference", "last_turn")),
        (PlainTextObjective(), ("text", "everything")),
    ],
)
def test_an_objective_names_its_rows_and_the_tokens_it_trains(objective: Objective, wanted: tuple[str, str]) -> None:
    assert wanted_tokens(objective) == wanted
