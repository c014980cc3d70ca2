"""What holds for every request: hosts, headers, one error shape, and health that tells what is wrong."""

import socket
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import text

from store.settings import Settings
from tests.api.conftest import Plane, problem, serve


def test_every_answer_carries_the_security_headers_and_an_id(plane: Plane, client: httpx.Client) -> None:
    for answer in (client.get("/models"), client.get("/nowhere"), client.get("/docs"), client.get("/static-docs/swagger-ui.css")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-request-id"]
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/models", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/models", headers={"X-Request-ID": "no good"}).headers["x-request-id"] != "no good"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("LOCALHOST", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 400), ("", 400)],
)
def test_only_known_host_names_are_answered(plane: Plane, host: str, status: int) -> None:
    address = urlsplit(plane.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
        raw.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert raw.recv(200).startswith(f"HTTP/1.1 {status}".encode())


@pytest.mark.parametrize(("allowed", "status"), [(("strop.example",), 200), (("*",), 200), ((), 400)])
def test_further_host_names_are_a_setting(plane: Plane, settings: Settings, allowed: tuple[str, ...], status: int) -> None:
    with serve(settings.model_copy(update={"allowed_hosts": allowed})) as url:
        answer = httpx.get(f"{url}/healthz", headers={"Host": "strop.example"}, trust_env=False)
    assert answer.status_code == status


def test_paths_and_methods_that_are_not_there_are_problems(client: httpx.Client) -> None:
    assert problem(client.get("/nowhere"), 404)["type"] == "/problems/not-found"
    answer = client.put("/jobs")
    assert problem(answer, 405)["type"] == "/problems/method-not-allowed"
    assert answer.headers["allow"]
    problem(client.get("/jobs/"), 404)
    problem(client.get("/jobs/%00"), 422)


def test_an_unexpected_fault_is_a_problem_without_a_trace(plane: Plane, client: httpx.Client) -> None:
    with plane.database.transaction() as session:
        session.execute(text("ALTER TABLE model RENAME COLUMN weights TO gone"))
    answer = client.get("/models")
    body = problem(answer, 500)
    assert body["errors"] == []
    assert "gone" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_database_that_is_away_is_a_503_to_try_again(plane: Plane, settings: Settings) -> None:
    away = settings.model_copy(update={"database_url": "postgresql+psycopg://nobody@127.0.0.1:1/none"})
    with serve(away) as url, httpx.Client(base_url=url, trust_env=False) as client:
        answer = client.get("/models", headers={"Authorization": f"Bearer {plane.token()}"})
        assert problem(answer, 503)["type"] == "/problems/unavailable"
        assert int(answer.headers["retry-after"]) > 0
        assert client.get("/healthz").json() == {"status": "ok"}
        body = problem(client.get("/readyz"), 503)
        assert "postgres" in {error["code"] for error in body["errors"]}
        assert "127.0.0.1" not in str(body)


def test_readiness_names_every_part_that_is_not_in_order(plane: Plane) -> None:
    client = plane.client_of(None)
    assert client.get("/readyz").json() == {"status": "ok"}
    assert plane.files() == []
    plane.redis_server.kill()
    with plane.database.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'old'"))
    storage = plane.settings.home / "files"
    for path in storage.iterdir():
        path.rmdir()
    storage.rmdir()
    storage.write_text("a file where the folder should be")
    body = problem(client.get("/readyz"), 503)
    assert {error["code"] for error in body["errors"]} == {"redis", "migrations", "storage"}
    assert client.get("/healthz").status_code == 200


def test_prometheus_shows_requests_jobs_queues_and_workers(plane: Plane, client: httpx.Client) -> None:
    plane.job(client)
    client.get("/jobs/job_none")
    shown = client.get("/prometheus").text
    assert 'strop_http_requests_total{method="GET",route="/jobs/{job_id}",status="404"} 1.0' in shown
    assert 'strop_jobs{status="validating_files"} 1.0' in shown
    assert 'strop_bells{queue="prepare"} 1.0' in shown
    assert "strop_oldest_queued_job_seconds 0.0" in shown
    assert 'strop_workers{queue="gpu"} 0.0' in shown
    assert "strop_http_request_seconds_bucket" in shown
