"""Adapters and models over HTTP: what was published is listed, downloaded as one archive, and wished for with a NOTIFY."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import select

from core.adapter import AdapterFacts, BaseIdentity, ParitySummary
from core.manifest import closed_folder, folder_digest, verify_folder
from store import files
from store.adapters import add_version
from store.tables import DEFAULT_PROJECT, Audit, Deployment, Endpoint, Receipt
from tests.api.conftest import Plane, problem

DEPLOYED = {"deployed": True, "undeployed": False}


@pytest.fixture
def adapter_id(plane: Plane, client: httpx.Client, tmp_path: Path) -> str:
    """One adapter with two versions; the second one's files lie in the storage."""
    for version in (1, 2):
        claim = plane.running(client, adapter_name="my-adapter")
        folder = tmp_path / f"adapter-{version}"
        with closed_folder(folder, "adapter", {}) as filling:
            (filling / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 5000 * version)
            (filling / "adapter_config.json").write_text("{}")
            (filling / "nested").mkdir()
            (filling / "nested" / "note.txt").write_text("schön")
        sha256 = folder_digest(folder)
        plane.storage.publish_folder(folder, files.adapter_key(sha256))
        plane.finish(claim, sha256)
    adapter_id: str = client.get(f"/jobs/{claim.job_id}").json()["adapter_id"]
    return adapter_id


def test_an_adapter_shows_its_versions_newest_first(client: httpx.Client, adapter_id: str) -> None:
    record = client.get(f"/adapters/{adapter_id}").json()
    assert (record["name"], record["latest_version"]) == ("my-adapter", 2)
    assert [(v["version"], v["deployed"], v["tuning"], v["eval_loss"]) for v in record["versions"]] == [
        (2, False, "lora", 1.5),
        (1, False, "lora", 1.5),
    ]
    assert client.get("/adapters").json() == {"object": "list", "data": [record], "has_more": False, "next_cursor": None}


def test_a_version_shows_what_was_measured_and_an_imported_one_has_no_job(plane: Plane, client: httpx.Client) -> None:
    measured = ParitySummary(
        device="cuda", probes=16, tokens=900, loss=1.25, base_loss=2.5, modules=224, inert=["model.layers.3.mlp.up_proj"]
    )
    facts = AdapterFacts(
        tuning="lora",
        base=BaseIdentity(model="tiny", weights="w" * 64),
        job_id=None,
        attempt=0,
        step=0,
        rank=8,
        template="t",
        eval_loss=None,
        parity=measured,
    )
    with plane.database.transaction() as session:
        version = add_version(session, DEFAULT_PROJECT, "guest", job_id=None, sha256="0" * 64, size=1, facts=facts)
    (shown,) = client.get(f"/adapters/{version.adapter_id}").json()["versions"]
    assert (shown["job_id"], shown["parity"]) == (None, measured.model_dump())


def test_a_download_is_the_folder_and_always_the_same_bytes(client: httpx.Client, adapter_id: str, tmp_path: Path) -> None:
    answer = client.get(f"/adapters/{adapter_id}/download")
    assert answer.headers["content-type"] == "application/gzip"
    assert answer.headers["content-disposition"] == 'attachment; filename="my-adapter-v2.tar.gz"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    folder = tmp_path / "out" / "my-adapter-v2"
    verify_folder(folder, "adapter")
    assert (folder / "nested" / "note.txt").read_text() == "schön"
    assert f'"{folder_digest(folder)}"' == answer.headers["etag"]
    again = client.get(f"/adapters/{adapter_id}/download", params={"version": 2})
    assert hashlib.sha256(again.content).digest() == hashlib.sha256(answer.content).digest()
    first = client.get(f"/adapters/{adapter_id}/download", params={"version": 1})
    assert first.content != answer.content
    problem(client.get(f"/adapters/{adapter_id}/download", params={"version": 3}), 404)
    problem(client.get(f"/adapters/{adapter_id}/download", params={"version": 0}), 422)


def test_files_that_are_away_are_a_503(plane: Plane, client: httpx.Client, adapter_id: str) -> None:
    sha256 = client.get(f"/adapters/{adapter_id}").json()["versions"][0]["sha256"]
    plane.storage.delete(files.adapter_key(sha256))
    problem(client.get(f"/adapters/{adapter_id}/download"), 503)


def test_a_deployment_is_a_row_and_a_notification_of_the_same_transaction(
    plane: Plane, client: httpx.Client, adapter_id: str
) -> None:
    address = plane.database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as listener:
        listener.execute("LISTEN strop_deployments")
        record = client.post(f"/adapters/{adapter_id}/deploy", json={}).json()
        assert [version["deployed"] for version in record["versions"]] == [True, False]
        client.post(f"/adapters/{adapter_id}/deploy", json={"version": 1})
        record = client.post(f"/adapters/{adapter_id}/undeploy", json={"version": 2}).json()
        assert [version["deployed"] for version in record["versions"]] == [False, True]
        record = client.post(f"/adapters/{adapter_id}/undeploy", json={}).json()
        assert [version["deployed"] for version in record["versions"]] == [False, False]
        notes = list(listener.notifies(timeout=10, stop_after=4))
    assert [note.payload for note in notes] == [adapter_id] * 4
    with plane.database.transaction() as session:
        wishes = {(row.version, row.desired) for row in session.scalars(select(Deployment))}
        done = [row.action for row in session.scalars(select(Audit).order_by(Audit.id)) if row.object_id == adapter_id]
    assert wishes == {(1, "undeployed"), (2, "undeployed")}
    assert done == ["adapter.deploy", "adapter.deploy", "adapter.undeploy", "adapter.undeploy"]


def test_a_wish_that_can_t_be_is_refused(client: httpx.Client, adapter_id: str) -> None:
    for action in ("deploy", "undeploy"):
        problem(client.post(f"/adapters/{adapter_id}/{action}", json={"version": 3}), 404)
        problem(client.post(f"/adapters/ada_none/{action}", json={}), 404)
        problem(client.post(f"/adapters/{adapter_id}/{action}", json={"version": 0}), 422)
        problem(client.post(f"/adapters/{adapter_id}/{action}", json={"versions": 1}), 422)
        problem(client.post(f"/adapters/{adapter_id}/{action}", content=b"{", headers={"Content-Type": "application/json"}), 400)


def test_an_endpoint_is_named_once_all_its_newest_checks_passed(plane: Plane, client: httpx.Client, adapter_id: str) -> None:
    def receipt(boot: str, check: str, passed: bool) -> None:
        with plane.database.transaction() as session:
            session.add(
                Receipt(
                    project_id="prj_default",
                    adapter_id=adapter_id,
                    version=2,
                    endpoint_boot_id=boot,
                    endpoint_name=f"endpoint-{boot}",
                    check=check,
                    passed=passed,
                    numbers={"nats": 0.01},
                )
            )

    def servable() -> list[str]:
        names: list[str] = client.get(f"/adapters/{adapter_id}").json()["versions"][0]["servable_on"]
        return names

    with plane.database.transaction() as session:
        session.add_all([Endpoint(boot_id=boot, name=boot, bases=[], device="cpu") for boot in ("a", "b")])
    receipt("a", "parity", True)
    receipt("a", "base", False)
    receipt("b", "parity", True)
    receipt("gone", "parity", True)
    assert servable() == ["endpoint-b"]
    receipt("a", "base", True)
    assert servable() == ["endpoint-a", "endpoint-b"]
    shown = client.get(f"/adapters/{adapter_id}").json()["versions"][0]["receipts"]
    assert (len(shown), shown[0]["check"], shown[0]["numbers"]) == (5, "base", {"nats": 0.01})


def test_models_are_listed_and_found_under_names_with_a_slash(client: httpx.Client) -> None:
    body = client.get("/models").json()
    assert [(m["name"], m["family"], m["context_length"]) for m in body["data"]] == [
        ("org/Small", "LlamaForCausalLM", 2048),
        ("tiny", "LlamaForCausalLM", 512),
    ]
    assert client.get("/models/org/Small").json() == body["data"][0]
    assert "folder" not in json.dumps(body)
    problem(client.get("/models/nobody"), 404)
    problem(client.get("/models/~"), 422)
