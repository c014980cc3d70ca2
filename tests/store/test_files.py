"""Storage on a local folder and on S3: the same promises under the same keys."""

import json
import urllib.request
from pathlib import Path

import pytest

from core.errors import ArtifactError
from core.manifest import closed_folder, verify_folder
from store.files import Storage


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "files"), tmp_path / "cache")


def make(folder: Path, text: str = "x") -> Path:
    with closed_folder(folder, "k", {"n": 1}) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "data").write_text(text)
    return folder


def test_a_published_folder_verifies_and_leaves_no_local_one(local: Storage, tmp_path: Path) -> None:
    folder = make(tmp_path / "run" / "a")
    local.publish_folder(folder, "adapters/1")
    assert not folder.exists()
    assert verify_folder(local.fetch_folder("adapters/1"), "k") == {"n": 1}
    assert local.folder_files("adapters/1") == ["manifest.json", "sub/data"]


def test_a_folder_that_stands_is_left_as_it_is(local: Storage, tmp_path: Path) -> None:
    local.publish_folder(make(tmp_path / "a", "first"), "adapters/1")
    local.publish_folder(make(tmp_path / "b", "second"), "adapters/1")
    assert (local.fetch_folder("adapters/1") / "sub" / "data").read_text() == "first"


def test_a_folder_without_manifest_is_not_there_and_gives_way(local: Storage, tmp_path: Path) -> None:
    torn = tmp_path / "files" / "adapters" / "1"
    torn.mkdir(parents=True)
    (torn / "rest").write_text("?")
    with pytest.raises(FileNotFoundError):
        local.fetch_folder("adapters/1")
    local.publish_folder(make(tmp_path / "a"), "adapters/1")
    assert local.folder_files("adapters/1") == ["manifest.json", "sub/data"]


def test_an_unclosed_folder_is_refused(local: Storage, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    with pytest.raises(ArtifactError):
        local.publish_folder(tmp_path / "open", "adapters/1")


def test_files_are_put_read_and_deleted(local: Storage, tmp_path: Path) -> None:
    source = tmp_path / "log"
    source.write_bytes(b"0123456789")
    local.put_file(source, "jobs/1/log")
    assert source.exists()
    assert local.read_range("jobs/1/log", 4, 3) == b"456"
    assert local.read_range("jobs/none/log", 0, 9) == b""
    assert b"".join(local.read_chunks("jobs/1/log")) == b"0123456789"
    local.put_file(source, "jobs/1/log", move=True)
    assert not source.exists()
    assert local.size("jobs/1/log") == 10
    local.delete("jobs/1/log")
    local.delete("jobs/1/log")
    assert not local.exists("jobs/1/log")
    assert [path.name for path in (tmp_path / "files" / "jobs" / "1").iterdir()] == []


def test_s3_keeps_the_same_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_module = pytest.importorskip("moto.server", reason="moto is a development extra")
    pytest.importorskip("s3fs", reason="s3fs is an extra")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
        storage = Storage("s3://bucket/prefix", tmp_path / "cache")
        storage.publish_folder(make(tmp_path / "a", json.dumps({"a": 1})), "adapters/1")
        assert not (tmp_path / "a").exists()
        assert verify_folder(storage.fetch_folder("adapters/1"), "k") == {"n": 1}
        assert storage.folder_files("adapters/1") == ["manifest.json", "sub/data"]
        with pytest.raises(FileNotFoundError):
            storage.fetch_folder("adapters/2")
        source = tmp_path / "log"
        source.write_bytes(b"0123456789")
        storage.put_file(source, "jobs/1/log", move=True)
        assert not source.exists()
        assert storage.read_range("jobs/1/log", 4, 3) == b"456"
        assert storage.fetch_file("jobs/1/log", tmp_path / "got").read_bytes() == b"0123456789"
        storage.delete("adapters/1")
        assert not storage.exists("adapters/1/manifest.json")
    finally:
        server.stop()
