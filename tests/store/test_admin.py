"""The operator's commands: repeatable, quiet about secrets, and refusing what would unbind adapters from their base."""

import json
import re
import shutil
import stat
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select, text

from store import keys, schema
from store.admin import main
from store.db import Database
from store.settings import Settings
from store.tables import DEFAULT_PROJECT, Adapter, ApiKey, Audit, Model


def run(settings: Settings, *arguments: str) -> int:
    return main(list(arguments), settings)


def models_in(database: Database) -> dict[str, str]:
    with database.transaction() as session:
        return {model.name: model.folder for model in session.scalars(select(Model))}


def test_init_makes_pepper_project_and_first_key_once(
    settings: Settings, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    (settings.home / "pepper").unlink()
    assert run(settings, "init") == 0
    files = {name: settings.home / name for name in ("pepper", "api_key")}
    kept = {name: path.read_text() for name, path in files.items()}
    for path in files.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with database.transaction() as session:
        caller = keys.authenticate(session, settings.pepper, kept["api_key"].strip())
    assert caller.scopes == {"admin"}
    assert run(settings, "init") == 0
    assert {name: path.read_text() for name, path in files.items()} == kept
    with database.transaction() as session:
        assert len(session.scalars(select(ApiKey)).all()) == 1
        assert [row.action for row in session.scalars(select(Audit))] == ["key.create"]
    shown = capsys.readouterr()
    assert kept["api_key"].strip() not in shown.out + shown.err
    assert kept["pepper"].strip() not in shown.out + shown.err


def test_migrate_brings_an_empty_database_to_the_newest_schema_and_can_be_repeated(
    settings: Settings, database: Database, database_url: str
) -> None:
    database.close()
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    with database.transaction() as session:
        assert schema.current_revision(session) is None
    for _ in range(2):
        assert run(settings, "migrate") == 0
    with database.transaction() as session:
        assert schema.current_revision(session) == schema.newest_revision() is not None


def test_keys_are_created_listed_and_revoked(settings: Settings, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, "keys", "create", "--name", "ci", "--scopes", "jobs:read, jobs:write", "--expires-days", "7") == 0
    token = capsys.readouterr().out.strip()
    with database.transaction() as session:
        caller = keys.authenticate(session, settings.pepper, token)
    assert caller.scopes == {"jobs:read", "jobs:write"}
    assert run(settings, "keys", "list") == 0
    listed = capsys.readouterr().out
    assert caller.key_id in listed
    assert "ci\tjobs:read,jobs:write" in listed
    assert token not in listed
    assert run(settings, "keys", "revoke", caller.key_id) == 0
    with database.transaction() as session, pytest.raises(Exception, match="revoked"):
        keys.authenticate(session, settings.pepper, token)
    assert run(settings, "keys", "create", "--name", "x", "--scopes", "jobs:everything") == 1
    assert "jobs:everything" in capsys.readouterr().err
    assert run(settings, "keys", "revoke", "key_none") == 1


def test_a_scan_registers_folders_two_levels_deep_and_names_those_that_can_t_be(
    settings: Settings, database: Database, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = settings.models_folder
    shutil.copytree(tiny_model, root / "org" / "nested")
    (root / "linked").symlink_to(tiny_model)
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{}")
    assert run(settings, "models", "scan") == 1
    assert "broken" in capsys.readouterr().err
    assert models_in(database) == {"linked": "linked", "org/nested": "org/nested"}
    shutil.rmtree(root / "broken")
    assert run(settings, "models", "scan") == 0
    assert run(settings, "models", "list") == 0
    shown = capsys.readouterr().out
    assert "linked: known" in shown
    assert "LlamaForCausalLM" in shown
    with database.transaction() as session:
        assert len(session.scalars(select(Audit)).all()) == 2


def test_a_scan_of_nothing_is_no_error(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, "models", "scan") == 0
    assert "no model folder" in capsys.readouterr().out


def test_a_folder_from_elsewhere_is_copied_in_and_one_inside_stays(
    settings: Settings, database: Database, tiny_model: Path
) -> None:
    assert run(settings, "models", "add", str(tiny_model), "--name", "org/copy") == 0
    copied = settings.models_folder / "org" / "copy"
    assert {path.name for path in copied.iterdir()} == {path.name for path in tiny_model.iterdir()}
    assert stat.S_IMODE((copied / "model.safetensors").stat().st_mode) == 0o644
    assert run(settings, "models", "add", str(copied)) == 0
    assert run(settings, "models", "add", str(tiny_model), "--name", "org/copy") == 1
    assert models_in(database) == {"org/copy": "org/copy"}


def test_changed_weights_under_a_known_name_are_refused_with_both_digests(
    settings: Settings, database: Database, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings, "models", "add", str(tiny_model), "--name", "m")
    with database.transaction() as session:
        known = session.scalars(select(Model.weights)).one()
    path = settings.models_folder / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(settings, "models", "scan") == 1
    complaint = capsys.readouterr().err
    assert known in complaint
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", complaint))) == 2
    with database.transaction() as session:
        assert session.scalars(select(Model.weights)).one() == known


def with_own_code(folder: Path, tiny_model: Path) -> Path:
    """A model folder of an architecture that strop doesn't know, with the file that auto_map names."""
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["ToyForCausalLM"], "model_type": "toy"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_toy.py").write_text("raise SystemExit('registration runs no code')\n")
    return folder


def test_a_model_with_its_own_code_needs_the_operator_s_word_once(
    settings: Settings, database: Database, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_own_code(tmp_path / "source", tiny_model)
    assert run(settings, "models", "add", str(source), "--name", "toy") == 1
    assert "register the model with --allow-remote-code" in capsys.readouterr().err
    assert models_in(database) == {}
    assert not (settings.models_folder / "toy").exists()
    assert run(settings, "models", "add", str(source), "--name", "toy", "--allow-remote-code") == 0
    assert "runs its own code" in capsys.readouterr().out
    assert run(settings, "models", "scan") == 0, "a scan takes the word that was given"
    with database.transaction() as session:
        assert session.scalars(select(Model.allow_remote_code)).one() is True
        assert [row.detail["allow_remote_code"] for row in session.scalars(select(Audit))] == [True]


def test_a_scan_never_gives_the_word(settings: Settings, database: Database, tiny_model: Path) -> None:
    with_own_code(settings.models_folder / "toy", tiny_model)
    assert run(settings, "models", "scan") == 1
    assert models_in(database) == {}


def test_changed_code_under_a_known_name_is_refused_with_both_digests(
    settings: Settings, database: Database, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_own_code(settings.models_folder / "toy", tiny_model)
    assert run(settings, "models", "add", str(folder), "--allow-remote-code") == 0
    with database.transaction() as session:
        known = session.scalars(select(Model.config)).one()
    (folder / "modeling_toy.py").write_text("raise SystemExit('other code')\n")
    for command in (["scan"], ["add", str(folder), "--allow-remote-code"]):
        assert run(settings, "models", *command) == 1
        complaint = capsys.readouterr().err
        assert known["strop_remote_code"]["code"] in complaint
        assert len(set(re.findall(r"\b[0-9a-f]{64}\b", complaint))) == 2
    with database.transaction() as session:
        assert session.scalars(select(Model.config)).one() == known


def test_the_word_changes_nothing_for_a_known_architecture(
    settings: Settings, database: Database, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, "models", "add", str(tiny_model), "--name", "m", "--allow-remote-code") == 0
    assert "the code in its folder is not used" in capsys.readouterr().out
    with database.transaction() as session:
        assert session.scalars(select(Model.allow_remote_code)).one() is False


@pytest.mark.parametrize("name", ["../out", "a/b/c", "", "/etc", "a b", "ü"])
def test_a_name_that_is_no_name_is_refused(settings: Settings, database: Database, tiny_model: Path, name: str) -> None:
    assert run(settings, "models", "add", str(tiny_model), f"--name={name}") == (1 if name else 0)
    assert len(models_in(database)) == (0 if name else 1)


def test_a_model_never_takes_an_adapter_s_name(settings: Settings, database: Database, tiny_model: Path) -> None:
    with database.transaction() as session:
        session.add(Adapter(id="ada_x", project_id=DEFAULT_PROJECT, name="mine"))
    assert run(settings, "models", "add", str(tiny_model), "--name", "mine") == 1
    assert models_in(database) == {}


def test_the_hub_is_closed_unless_opened(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, "models", "add", "org/name") == 1
    assert "STROP_HUB=1" in capsys.readouterr().err


def test_a_database_that_is_not_there_is_one_sentence(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = settings.model_copy(update={"database_url": ""})
    assert run(nowhere, "models", "list") == 1
    assert capsys.readouterr().err.strip() == "ValueError: DATABASE_URL is not set"
