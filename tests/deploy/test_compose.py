"""docker-compose.yml, Dockerfile and Dockerfile.gpu: valid, and as tight as docs/deploy.md says. No engine is needed."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from compose_spec import PyCompose

from store.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
OURS = ("migrate", "api", "preparer", "worker", "serving")
IMAGES = {"Dockerfile": ("api", "prepare"), "Dockerfile.gpu": ("worker", "serving")}
FOREIGN_NAMES = {
    *("PATH", "TMPDIR", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"),
    *("POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE", "POSTGRES_INITDB_ARGS"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
}
"""Variables of Python, PostgreSQL and torch; every other one must be a setting."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE)
    return loaded


def test_the_compose_file_is_valid(compose: dict[str, Any]) -> None:
    # Dumped again, because the validator knows no YAML merge keys.
    PyCompose.from_yaml(yaml.safe_dump(compose)).validate()


@pytest.mark.parametrize(("right", "wrong"), [("device_ids:", "devise_ids:"), ("healthcheck:", "healthchek:")])
def test_the_validator_can_tell(compose: dict[str, Any], right: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong.rstrip(":")):
        PyCompose.from_yaml(yaml.safe_dump(compose).replace(right, wrong)).validate()


@pytest.mark.parametrize("file", IMAGES)
def test_hadolint_finds_nothing(file: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", ROOT / file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_environment_name_is_a_setting(compose: dict[str, Any]) -> None:
    settings = {field.validation_alias.choices[0] for field in Settings.model_fields.values()}  # type: ignore[union-attr]
    names = {name for service in compose["services"].values() for name in service.get("environment", {})}
    names |= set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.M))
    for file in IMAGES:
        names |= set(re.findall(r"^(?:ENV | {4})([A-Z_]+)=", (ROOT / file).read_text(), re.M))
    assert {"DATABASE_URL", "STROP_BASES", "STROP_HOME"} <= names
    assert names - settings - FOREIGN_NAMES == set()


def test_secrets_are_files_and_stand_nowhere_else(compose: dict[str, Any]) -> None:
    assert {name: set(secret) for name, secret in compose["secrets"].items()} == {
        name: {"file"} for name in ("database_password", "redis_password", "pepper")
    }
    for name in OURS:
        service = compose["services"][name]
        assert set(service["secrets"]) == set(compose["secrets"])
        assert service["environment"]["STROP_DATABASE_PASSWORD_FILE"] == "/run/secrets/database_password"
        assert service["environment"]["STROP_REDIS_PASSWORD_FILE"] == "/run/secrets/redis_password"
        assert service["environment"]["STROP_PEPPER_FILE"] == "/run/secrets/pepper"
    for service in compose["services"].values():
        for key, value in service.get("environment", {}).items():
            assert key.endswith("_FILE") or not re.search("PASSWORD|SECRET|TOKEN|KEY", key), key
            assert not re.search(r"://[^/]*:[^/]*@", str(value)), f"{key} holds a password"


def test_no_container_runs_as_root_or_keeps_a_capability(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert "privileged" not in service, name
        if name not in OURS:
            assert service["user"] == name, name
    for file, targets in IMAGES.items():
        for target in targets:
            assert _user_of(file, target) == "10001:10001", (file, target)


def test_no_database_is_reachable_from_outside(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8000:8000"], "serving": ["127.0.0.1:8001:8001"]}
    assert compose["networks"]["inside"]["internal"] is True
    on_the_way_out = {name for name, service in compose["services"].items() if "outside" in service["networks"]}
    assert on_the_way_out == {"api", "serving"}


def test_gpus_are_reserved_for_those_who_compute(compose: dict[str, Any]) -> None:
    with_gpu = {name for name, service in compose["services"].items() if "deploy" in service}
    assert with_gpu == {"worker", "serving"}
    for name in with_gpu:
        [device] = compose["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_everything_waits_for_the_migrations_and_workers_get_time_to_drain(compose: dict[str, Any]) -> None:
    for name in ("api", "preparer", "worker", "serving"):
        assert compose["services"][name]["depends_on"] == {
            "postgres": {"condition": "service_healthy"},
            "redis": {"condition": "service_healthy"},
            "migrate": {"condition": "service_completed_successfully"},
        }
    assert compose["services"]["migrate"]["restart"] == "on-failure"
    default_stop_seconds = Settings.model_fields["stop_seconds"].default
    for name, stop_seconds in (("worker", 300), ("preparer", 120)):
        assert compose["services"][name]["stop_grace_period"] == f"{stop_seconds // 60}m"
        assert stop_seconds > 2 * default_stop_seconds
    for name in ("postgres", "redis", "api", "serving"):
        assert compose["services"][name]["healthcheck"]["test"], name


def test_every_volume_and_target_exists(compose: dict[str, Any]) -> None:
    used = {
        mount.split(":")[0]
        for service in compose["services"].values()
        for mount in service.get("volumes", [])
        if not mount.startswith(".")
    }
    assert used == set(compose["volumes"])
    for name in OURS:
        build = compose["services"][name]["build"]
        assert build["target"] in IMAGES[build.get("dockerfile", "Dockerfile")], name


@pytest.mark.parametrize("extra", ["api", "prepare", "s3"])
def test_the_images_without_a_gpu_install_no_torch(extra: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def closure(name: str) -> set[str]:
        found: set[str] = set()
        for requirement in extras[name]:
            inner = re.fullmatch(r"strop\[([a-z0-9,]+)\]", requirement)
            found |= set().union(*map(closure, inner[1].split(","))) if inner else {re.split(r"[\[><=~! ]", requirement)[0]}
        return found

    assert "torch" in closure("gpu")  # the closure can see one
    assert closure(extra) & {"torch", "transformers", "peft", "accelerate", "bitsandbytes"} == set()
    for installed in re.findall(r"--editable '\.\[([a-z0-9,]+)\]'", (ROOT / "Dockerfile").read_text()):
        assert set(installed.split(",")) <= {"api", "prepare", "s3"}


def test_the_images_copy_every_house_their_process_imports() -> None:
    for file, houses in {"Dockerfile": "core store migrations api worker", "Dockerfile.gpu": "core store worker serving"}.items():
        text = (ROOT / file).read_text()
        for house in houses.split():
            assert f"COPY {house} {house}\n" in text
            assert f"!{house}\n" in (ROOT / ".dockerignore").read_text()


def _user_of(file: str, target: str) -> str | None:
    """The user of a target, following FROM through the stages of the file."""
    stages: dict[str, tuple[str, str | None]] = {}
    current = ""
    for line in (ROOT / file).read_text().splitlines():
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            current = start[2]
            stages[current] = (start[1], None)
        elif user := re.fullmatch(r"USER (\S+)", line):
            stages[current] = (stages[current][0], user[1])
    while target in stages:
        source, user_name = stages[target]
        if user_name is not None:
            return user_name
        target = source
    return None
