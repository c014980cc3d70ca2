"""API keys in the record: made, proven, ended."""

import zlib
from datetime import timedelta

import pytest

from core.errors import Forbidden, InvalidInput, NotFound, Unauthenticated
from store import keys
from store.db import Database
from store.tables import DEFAULT_PROJECT, ApiKey

PEPPER = b"p" * 32


def make(database: Database, *scopes: str, lifetime: timedelta | None = None) -> tuple[str, str]:
    with database.transaction() as session:
        key, token = keys.create_key(
            session, PEPPER, DEFAULT_PROJECT, name="n", scopes=list(scopes) or [keys.ADMIN], lifetime=lifetime
        )
        return key.id, token


def whose(database: Database, token: str) -> keys.Caller:
    with database.transaction() as session:
        return keys.authenticate(session, PEPPER, token)


def test_a_token_has_id_secret_and_checksum_and_proves_its_caller(database: Database) -> None:
    key_id, token = make(database, "jobs:read", "models:infer")
    strop, sk, number, secret, checksum = token.split("_")
    assert (strop, sk, f"key_{number}") == ("strop", "sk", key_id)
    assert (len(number), len(secret)) == (12, 32)
    assert int(checksum, 16) == zlib.crc32(token.rpartition("_")[0].encode())
    assert whose(database, token) == keys.Caller(DEFAULT_PROJECT, key_id, frozenset({"jobs:read", "models:infer"}))


def test_tokens_are_never_the_same_and_never_stored(database: Database) -> None:
    made = [make(database) for _ in range(20)]
    assert len({token.split("_")[3] for _, token in made}) == 20
    with database.transaction() as session:
        for key_id, token in made:
            row = session.get(ApiKey, key_id)
            assert row is not None
            assert token.split("_")[3] not in str(vars(row))


def test_each_character_of_a_token_counts(database: Database) -> None:
    _, token = make(database)
    for place in range(9, len(token)):
        wrong = token[:place] + ("0" if token[place] != "0" else "1") + token[place + 1 :]
        with pytest.raises(Unauthenticated):
            whose(database, wrong)


def test_a_key_ends_by_time_or_by_word(database: Database) -> None:
    _, expired = make(database, lifetime=timedelta(seconds=-1))
    key_id, token = make(database, lifetime=timedelta(days=1))
    with pytest.raises(Unauthenticated):
        whose(database, expired)
    whose(database, token)
    with database.transaction() as session:
        first = keys.revoke_key(session, key_id)
    with database.transaction() as session:
        assert keys.revoke_key(session, key_id) == first
        with pytest.raises(NotFound):
            keys.revoke_key(session, "key_none")
    with pytest.raises(Unauthenticated):
        whose(database, token)


def test_a_scope_is_needed_unless_the_key_is_admin() -> None:
    keys.Caller("p", "k", frozenset({"jobs:read"})).require("jobs:read")
    keys.Caller("p", "k", frozenset({"admin"})).require("jobs:write")
    with pytest.raises(Forbidden, match="jobs:write"):
        keys.Caller("p", "k", frozenset({"jobs:read"})).require("jobs:write")


@pytest.mark.parametrize("scopes", [[], ["jobs:read", "jobs:all"]])
def test_a_key_without_or_with_unknown_scopes_is_not_made(database: Database, scopes: list[str]) -> None:
    with database.transaction() as session, pytest.raises(InvalidInput):
        keys.create_key(session, PEPPER, DEFAULT_PROJECT, name="n", scopes=scopes)
