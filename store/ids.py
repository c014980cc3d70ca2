"""Prefixed random ids: `job_3f9k...`. 100 random bits in lower-case base 32, sortable by nothing, guessable by nobody."""

import secrets

_ALPHABET = "abcdefghijkmnopqrstuvwxyz2345679"


def new_id(prefix: str) -> str:
    """A fresh id, e.g. new_id("job") -> "job_" and 20 characters."""
    return prefix + "_" + "".join(secrets.choice(_ALPHABET) for _ in range(20))
