"""The OpenAPI page: every request body has an example, every error is documented, and no byte of it comes from outside."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.errors import PROBLEMS
from api.routes.jobs import SPEC_EXAMPLES
from core.spec import JobSpec
from store.settings import Settings
from tests.api.conftest import Plane, problem

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return create_app(Settings(_env_file=None, DATABASE_URL="postgresql://nowhere/none")).openapi()


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_every_request_body_has_an_example(schema: dict[str, Any]) -> None:
    bodies = {name: op["requestBody"] for name, op in operations(schema) if "requestBody" in op}
    assert len(bodies) == 5
    for name, body in bodies.items():
        for media in body["content"].values():
            assert media.get("examples") or media.get("example"), name


def test_the_examples_of_specs_are_specs() -> None:
    for example in SPEC_EXAMPLES.values():
        JobSpec.model_validate(example["value"])


def test_every_operation_documents_its_errors_as_problems(schema: dict[str, Any]) -> None:
    for name, operation in operations(schema):
        documented = {int(status) for status in operation["responses"]}
        needed = {400, 500, 503}
        needed |= {401, 403} if "security" in operation else set()
        needed |= {413, 415, 422} if "requestBody" in operation else set()
        needed |= {422} if operation.get("parameters") else set()
        needed |= {404} if "{" in name else set()
        assert needed <= documented, name
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (name, status)
                assert response["content"]["application/problem+json"]["schema"]["$ref"].endswith("/ProblemDetails")
            else:
                assert response["description"]
        assert operation.get("description") or operation["summary"], name


def test_the_framework_s_own_error_shapes_are_gone_and_all_references_resolve(schema: dict[str, Any]) -> None:
    components = schema["components"]["schemas"]
    assert not {"HTTPValidationError", "ValidationError"} & set(components)
    references = set(re.findall(r"#/components/schemas/([\w.-]+)", str(schema)))
    assert references <= set(components)
    assert all(re.fullmatch(r"[a-zA-Z0-9._-]+", name) for group in schema["components"].values() for name in group)


def test_metrics_and_events_name_all_their_representations(schema: dict[str, Any]) -> None:
    content = schema["paths"]["/jobs/{job_id}/metrics"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/csv", "text/event-stream"}
    content = schema["paths"]["/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}


def test_the_upload_is_shown_as_a_file_picker(schema: dict[str, Any]) -> None:
    form = schema["paths"]["/datasets"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["file"]["format"] == "binary"


def test_the_docs_page_and_all_it_loads_come_from_here(plane: Plane) -> None:
    client = plane.client_of(None)
    page = client.get("/docs")
    assert page.status_code == 200
    assert not re.search(r"https?:|//cdn", page.text)
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 3
    for path in [*loaded, "/openapi.json"]:
        assert client.get(path).status_code == 200, path
    assert "unsafe-inline" not in page.headers["content-security-policy"].partition("script-src")[2].partition(";")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to render /docs with")
def test_the_docs_page_renders_every_operation_with_the_network_cut(plane: Plane, schema: dict[str, Any], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=15000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, f"{plane.url}/docs"], capture_output=True, text=True, timeout=120, check=True)
    for path in schema["paths"]:
        assert f'data-path="{path}"' in done.stdout, path


def test_every_kind_of_problem_has_a_page(plane: Plane) -> None:
    client = plane.client_of(None)
    for code, (status, title, advice) in PROBLEMS.items():
        page = client.get(f"/problems/{code}")
        assert page.status_code == 200
        assert str(status) in page.text
        assert title.split("'")[0] in page.text
        assert advice
    problem(client.get("/problems/none"), 404)


def test_the_page_s_source_is_read_without_a_key(plane: Plane) -> None:
    with httpx.Client(base_url=plane.url, trust_env=False) as client:
        assert client.get("/openapi.json").json()["info"]["title"] == "strop"
