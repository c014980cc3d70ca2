"""Datasets over HTTP: what is uploaded is what is stored, and what fails leaves nothing."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from sqlalchemy import select

from store.settings import Settings
from store.tables import Audit, Dataset, Outbox
from tests.api.conftest import ROWS, Plane, places, problem, serve, sha256

BOUNDARY = "b0undary"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def form(*parts: tuple[str, bytes]) -> bytes:
    """(Content-Disposition, data) parts as a multipart body."""
    body = b"".join(f"--{BOUNDARY}\r\nContent-Disposition: {head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
    return body + f"--{BOUNDARY}--\r\n".encode()


FILE = 'form-data; name="file"; filename="a.jsonl"'


def nothing_is_left(plane: Plane) -> bool:
    with plane.database.transaction() as session:
        rows = session.scalars(select(Dataset.id)).all()
        bells = session.scalars(select(Outbox.key)).all()
    return plane.files() == [] and rows == [] and bells == []


def test_an_upload_is_stored_recorded_and_read_back(plane: Plane, client: httpx.Client) -> None:
    answer = plane.upload(client, name="sums")
    assert answer.status_code == 201
    record = answer.json()
    assert (record["name"], record["filename"], record["status"]) == ("sums", "rows.jsonl", "uploaded")
    assert (record["bytes"], record["sha256"], record["report"]) == (len(ROWS), sha256(ROWS), None)
    assert b"".join(plane.storage.read_chunks(f"datasets/{record['id']}/upload")) == ROWS
    with plane.database.transaction() as session:
        assert session.scalars(select(Outbox.key)).all() == [record["id"]]
        assert [(row.action, row.object_id) for row in session.scalars(select(Audit))] == [("dataset.create", record["id"])]
    problem(client.get(f"/datasets/{record['id']}/report"), 409)
    plane.validate(record["id"])
    assert client.get(f"/datasets/{record['id']}").json()["status"] == "ready"
    assert client.get(f"/datasets/{record['id']}/report").json()["usable_rows"] == 12


def test_pages_hold_every_dataset_once_newest_first(plane: Plane, client: httpx.Client) -> None:
    made = [plane.upload(client).json()["id"] for _ in range(5)]
    found, cursor = [], {}
    while True:
        body = client.get("/datasets", params={"limit": 2, **cursor}).json()
        found += [record["id"] for record in body["data"]]
        if not body["has_more"]:
            break
        cursor = {"cursor": body["next_cursor"]}
    assert found == made[::-1]


def test_a_dataset_is_deleted_with_its_files_unless_a_job_reads_it(plane: Plane, client: httpx.Client) -> None:
    job_id = plane.job(client)
    dataset_id = client.get(f"/jobs/{job_id}").json()["spec"]["data"]["datasets"][0]["dataset_id"]
    body = problem(client.delete(f"/datasets/{dataset_id}"), 409)
    assert body["errors"][0]["message"] == job_id
    client.post(f"/jobs/{job_id}/cancel")
    assert client.delete(f"/datasets/{dataset_id}").status_code == 204
    assert plane.files() == []
    problem(client.get(f"/datasets/{dataset_id}"), 404)
    problem(client.delete(f"/datasets/{dataset_id}"), 404)
    body = problem(client.post("/jobs", json=plane.spec(dataset_id)), 422)
    assert ("unknown-dataset", "/data/datasets/0/dataset_id") in places(body)


def test_file_names_are_text_and_never_paths(plane: Plane, client: httpx.Client) -> None:
    for given, kept in {
        "../../etc/passwd": "passwd",
        "C:\\data\\rows.jsonl": "rows.jsonl",
        "tricky\u202efdp.exe": "trickyfdp.exe",
        "x" * 4000: "x" * 255,
    }.items():
        body = form((f'form-data; name="file"; filename="{given}"', b"{}"))
        answer = client.post("/datasets", content=body, headers=HEADERS)
        assert answer.json()["filename"] == kept, answer.text


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (form(), 422, "missing-file"),
        (form(('form-data; name="name"', b"x")), 422, "missing-file"),
        (form((FILE, b"")), 422, "empty-file"),
        (form((FILE, b"a"), (FILE, b"b")), 422, "several-files"),
        (form((FILE, b"a"), ('form-data; name="colour"', b"red")), 422, "unknown-field"),
        (form((FILE, b"a"), ('form-data; name="name"', b"a\x00b")), 422, "bad-name"),
        (form((FILE, b"a"), ('form-data; name="name"', b"\xff")), 422, "bad-name"),
        (form((FILE, b"a"), ('form-data; name="name"', b"x" * 2000)), 413, None),
        (form(*[('form-data; name="name"', b"")] * 20), 400, None),
        (form((FILE, b"abc"))[:-8], 400, None),
        (b"not multipart at all", 400, None),
        (b"", 400, None),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(
    plane: Plane, client: httpx.Client, body: bytes, status: int, code: str | None
) -> None:
    answer = problem(client.post("/datasets", content=body, headers=HEADERS), status)
    assert code is None or code in {error["code"] for error in answer["errors"]}
    assert nothing_is_left(plane)


def test_all_mistakes_of_a_form_are_named_at_once(client: httpx.Client) -> None:
    body = form(('form-data; name="colour"', b"red"), ('form-data; name="name"', b"\t"))
    answer = problem(client.post("/datasets", content=body, headers=HEADERS), 422)
    assert places(answer) == {("missing-file", "file"), ("unknown-field", "colour"), ("bad-name", "name")}


def test_what_is_not_a_form_is_refused_by_its_media_type(plane: Plane, client: httpx.Client) -> None:
    problem(client.post("/datasets", json={}), 415)
    problem(client.post("/datasets", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    packed = HEADERS | {"Content-Encoding": "gzip"}
    problem(client.post("/datasets", content=form((FILE, b"a")), headers=packed), 415)
    assert nothing_is_left(plane)


def test_a_file_over_the_cap_is_refused_declared_or_not(plane: Plane, settings: Settings) -> None:
    small = settings.model_copy(update={"upload_max_bytes": 1000})
    with serve(small) as url, httpx.Client(base_url=url, trust_env=False) as client:
        headers = HEADERS | {"Authorization": f"Bearer {plane.token()}"}
        assert client.post("/datasets", content=form((FILE, b"a" * 1000)), headers=headers).status_code == 201
        files = plane.files()

        def chunks(data: bytes) -> Iterator[bytes]:
            yield from (data[i : i + 500] for i in range(0, len(data), 500))

        problem(client.post("/datasets", content=form((FILE, b"a" * 1001)), headers=headers), 413)
        problem(client.post("/datasets", content=chunks(form((FILE, b"a" * 1001))), headers=headers), 413)
        problem(client.post("/datasets", content=form((FILE, b"a" * (2 << 20))), headers=headers), 413)
    assert plane.files() == files


def test_a_big_upload_needs_little_memory(plane: Plane, client: httpx.Client) -> None:
    size, piece = 256 << 20, b"x" * (1 << 16)
    process, peak, is_done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.01):
            peak = max(peak, process.memory_info().rss - before)

    def body() -> Iterator[bytes]:
        yield form((FILE, b"")).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        yield from (piece for _ in range(size // len(piece)))
        yield f"\r\n--{BOUNDARY}--\r\n".encode()

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = client.post("/datasets", content=body(), headers=HEADERS, timeout=120)
    is_done.set()
    watcher.join()
    assert answer.json()["bytes"] == size
    assert peak < 64 << 20


def test_a_client_that_goes_away_leaves_nothing(plane: Plane) -> None:
    address = urlsplit(plane.url)
    token = plane.token()
    uploads = plane.settings.scratch_folder / "uploads"
    with socket.create_connection((address.hostname, address.port)) as raw:
        head = f"POST /datasets HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        head += f"Content-Type: {HEADERS['Content-Type']}\r\nContent-Length: 9000000\r\n\r\n"
        raw.sendall(head.encode() + form((FILE, b"a" * 3_000_000))[:2_500_000])
        wait_for(lambda: any(path.stat().st_size > 0 for path in uploads.iterdir()))
    wait_for(lambda: nothing_is_left(plane))


def test_a_database_that_fails_at_the_end_leaves_no_file(plane: Plane, client: httpx.Client) -> None:
    with plane.database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE dataset ADD CONSTRAINT nothing CHECK (bytes < 0) NOT VALID")
    problem(plane.upload(client), 500)
    assert nothing_is_left(plane)


def test_an_upload_is_accepted_while_redis_is_away(plane: Plane, client: httpx.Client) -> None:
    plane.redis_server.kill()
    dataset_id = plane.upload(client).json()["id"]
    with plane.database.transaction() as session:
        bell = session.scalars(select(Outbox)).one()
        assert (bell.key, bell.sent_at) == (dataset_id, None)


def test_uploads_left_by_a_killed_process_go_at_the_next_start(plane: Plane, settings: Settings) -> None:
    old, new = (settings.scratch_folder / "uploads" / name for name in ("upload-old", "upload-new"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    with serve(settings):
        assert (old.exists(), new.exists()) == (False, True)


def wait_for(claim: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_real_datasets_are_stored_byte_for_byte(plane: Plane, client: httpx.Client, shared_data: Path) -> None:
    path = shared_data / "text" / "alpaca_seed_zh.jsonl"
    record = plane.upload(client, path.read_bytes(), path.name).json()
    assert (record["sha256"], record["name"]) == (sha256(path.read_bytes()), path.name)
