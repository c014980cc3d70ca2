"""Keys: every operation of the OpenAPI page against every way not to be allowed."""

import socket
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import select, update

from api.app import create_app
from store import keys
from store.settings import Settings
from store.tables import DEFAULT_PROJECT, ApiKey
from tests.api.conftest import OTHER_PROJECT, Plane, problem

PUBLIC = {"/healthz", "/readyz"}


def operations() -> Iterator[tuple[str, str, str | None]]:
    """(method, path, scope) of every operation; scope None for public ones."""
    schema = create_app(Settings(_env_file=None, DATABASE_URL="postgresql://nowhere/none")).openapi()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            [[scope]] = [next(iter(s.values())) for s in operation["security"]] if "security" in operation else [[None]]
            yield method.upper(), path, scope


OPERATIONS = list(operations())
SECURED = [(method, path, scope) for method, path, scope in OPERATIONS if scope is not None]
OF_A_PROJECT = [(method, path) for method, path, _ in SECURED if "{" in path and "{name}" not in path]


def filled(path: str, **ids: str) -> str:
    unknown = {"job_id": "job_none", "dataset_id": "ds_none", "adapter_id": "ada_none", "name": "none"}
    return path.format(**(unknown | ids))


def test_only_the_health_checks_need_no_key() -> None:
    assert {path for _, path, scope in OPERATIONS if scope is None} == PUBLIC
    assert len(SECURED) >= 22


def test_no_wrong_revoked_or_expired_key_gets_past_any_operation(plane: Plane) -> None:
    revoked, expired, valid = plane.token(), plane.token(lifetime=timedelta(seconds=-1)), plane.token()
    with plane.database.transaction() as session:
        keys.revoke_key(session, "key_" + revoked.split("_")[2])
    body, _, checksum = valid.rpartition("_")
    wrong_secret = valid[:24] + ("a" if valid[24] != "a" else "b") + valid[25:]
    bad = {
        "none": None,
        "revoked": revoked,
        "expired": expired,
        "no such id": "strop_sk_" + "a" * 12 + valid[21:],
        "wrong secret": wrong_secret,
        "wrong secret, right checksum": keys_checksum(wrong_secret),
        "wrong checksum": f"{body}_{int(checksum, 16) ^ 1:08x}",
        "not a key": "hello",
        "not ASCII": "strop_sk_ä",
    }
    for name, token in bad.items():
        header = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
        with httpx.Client(base_url=plane.url, headers=header, trust_env=False) as client:
            for method, path, _ in SECURED:
                answer = client.request(method, filled(path))
                problem(answer, 401)
                assert answer.headers["www-authenticate"].startswith("Bearer"), (name, method, path)
    with plane.client_of(None) as client:
        problem(client.get("/models", headers={"Authorization": f"Basic {valid}"}), 401)
        assert client.get("/models", headers={"Authorization": f"bearer {valid}"}).status_code == 200


def keys_checksum(token: str) -> str:
    body = token.rpartition("_")[0]
    return f"{body}_{keys._checksum(body)}"


@pytest.mark.parametrize("scope", sorted({scope for _, _, scope in SECURED}))
def test_a_scope_opens_its_operations_and_no_others(plane: Plane, scope: str) -> None:
    own = plane.client(scope)
    others = plane.client(*(s for s in keys.SCOPES if s not in (scope, keys.ADMIN)))
    for method, path, needed in SECURED:
        answer = own.request(method, filled(path))
        if needed == scope:
            assert answer.status_code not in (401, 403), (method, path)
            body = problem(others.request(method, filled(path)), 403)
            assert body["errors"][0]["message"] == f"needs {scope}"
        else:
            problem(answer, 403)


def test_another_project_gets_the_same_answer_as_for_what_does_not_exist(plane: Plane, client: httpx.Client) -> None:
    claim = plane.running(client)
    plane.finish(claim)
    job = client.get(f"/jobs/{claim.job_id}").json()
    theirs = {
        "job_id": claim.job_id,
        "adapter_id": job["adapter_id"],
        "dataset_id": job["spec"]["data"]["datasets"][0]["dataset_id"],
    }
    stranger = plane.client(project=OTHER_PROJECT)
    for method, path in OF_A_PROJECT:
        body = {"json": {}} if path.endswith("deploy") else {}
        seen = problem(stranger.request(method, filled(path, **theirs), **body), 404)
        absent = problem(stranger.request(method, filled(path), **body), 404)
        for name, value in theirs.items():
            seen["detail"] = seen["detail"].replace(value, filled(f"{{{name}}}"))
        assert seen | {"instance": ""} == absent | {"instance": ""}, (method, path)
    for path in ("/jobs", "/datasets", "/adapters"):
        assert stranger.get(path).json()["data"] == []
        problem(stranger.get(path, params={"cursor": theirs[{"/jobs": "job_id"}.get(path, path[1:-1] + "_id")]}), 404)
    spec = plane.spec(theirs["dataset_id"])
    assert problem(stranger.post("/jobs", json=spec), 422)["errors"][0]["code"] == "unknown-dataset"


def test_idempotency_keys_of_two_projects_are_apart(plane: Plane, client: httpx.Client) -> None:
    stranger = plane.client(project=OTHER_PROJECT)
    ids = set()
    for own in (client, stranger):
        spec = plane.spec(plane.ready_dataset(own))
        ids.add(own.post("/jobs", json=spec, headers={"Idempotency-Key": "1"}).json()["id"])
    assert len(ids) == 2


def test_without_a_key_no_byte_of_the_body_is_waited_for(plane: Plane) -> None:
    address = urlsplit(plane.url)
    for path in ("/jobs", "/datasets"):
        with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
            raw.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 401")


def test_the_last_use_of_a_key_is_noted_once_a_minute(plane: Plane, client: httpx.Client) -> None:
    def used() -> object:
        with plane.database.transaction() as session:
            return session.scalars(select(ApiKey.last_used_at)).one()

    client.get("/models")
    first = used()
    assert first is not None
    client.get("/models")
    assert used() == first
    with plane.database.transaction() as session:
        session.execute(update(ApiKey).values(last_used_at=ApiKey.created_at - timedelta(minutes=2)))
    client.get("/models")
    assert used() > first  # type: ignore[operator]


def test_the_database_holds_nothing_a_thief_could_use(plane: Plane) -> None:
    token = plane.token()
    secret = token.split("_")[3]
    with plane.database.transaction() as session:
        row = session.scalars(select(ApiKey).where(ApiKey.project_id == DEFAULT_PROJECT)).one()
        assert secret not in repr(vars(row))
        with pytest.raises(Exception, match="unknown, revoked or expired"):
            keys.authenticate(session, b"another pepper", token)
