"""The operator's commands: `python -m store.admin init|migrate|models|adapters|keys`. What they do is never offered over REST.

Everything can be repeated. A secret is printed once, when `keys create` makes it; the first key of an embedded service goes
into a file that only its owner reads.
"""

import argparse
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO, get_args

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError

from core.adapter import Quantization
from core.errors import ArtifactError, InvalidInput, UserError
from core.model_folder import read_model_facts
from store import audit, imports, keys, models, schema
from store.db import Database, database_url
from store.settings import Settings, get_settings
from store.tables import DEFAULT_PROJECT, Project

KEY_FILE = "api_key"
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    """Run one command; the process's exit code."""
    parsed = _parser().parse_args(arguments)
    settings = settings or get_settings()
    try:
        command: Callable[[Settings, argparse.Namespace], None] = parsed.command
        command(settings, parsed)
    except UserError as error:
        _say("\n".join([error.detail, *(f"  {problem.message}" for problem in error.problems)]), sys.stderr)
        return 1
    except (ArtifactError, ValueError, OSError, OperationalError) as error:
        _say(f"{type(error).__name__}: {error}", sys.stderr)
        return 1
    return 0


def init(settings: Settings, _: argparse.Namespace) -> None:
    """Make what is missing: the pepper, the default project, the first key."""
    _make_pepper(settings)
    key_file = settings.home / KEY_FILE
    database = Database(database_url(settings))
    try:
        with database.transaction() as session:
            project = insert(Project).values(id=DEFAULT_PROJECT, name="default")
            session.execute(project.on_conflict_do_nothing())
            if key_file.exists():
                return
            key, token = keys.create_key(session, settings.pepper, DEFAULT_PROJECT, name="first", scopes=[keys.ADMIN])
            audit.record(session, DEFAULT_PROJECT, None, "key.create", key.id, name="first", scopes=[keys.ADMIN])
            if not _write_secret(key_file, token):
                session.rollback()  # another process's key stands in the file, so this one must not exist
                return
    finally:
        database.close()
    _say(f"The first API key stands in {key_file}")


def migrate(settings: Settings, _: argparse.Namespace) -> None:
    schema.upgrade(settings)
    _say("The database is up to date")


def scan_models(settings: Settings, _: argparse.Namespace) -> None:
    """Register every model folder under STROP_MODELS. One that can't be is named, and the others are registered all the same."""
    root = settings.models_folder
    found = sorted({config.parent for pattern in ("*/config.json", "*/*/config.json") for config in root.glob(pattern)})
    refused = []
    for folder in found:
        try:
            _register(settings, folder.relative_to(root).as_posix(), folder)
        except (UserError, ArtifactError) as error:
            refused.append(folder.name)
            _say(f"{folder.relative_to(root)}: {error}", sys.stderr)
    if refused:
        raise InvalidInput(f"{len(refused)} of {len(found)} folders could not be registered: {', '.join(refused)}")
    if not found:
        _say(f"There is no model folder under {root}")


def add_model(settings: Settings, parsed: argparse.Namespace) -> None:
    """Register one folder (copied into STROP_MODELS unless it lies there), or fetch a model from the hub first."""
    source = Path(parsed.source)
    if source.is_dir():
        folder, name = _bring(settings, source, parsed.name, parsed.allow_remote_code)
    else:
        folder, name = _fetch(settings, parsed.source, parsed.revision, parsed.name, parsed.allow_remote_code)
    _register(settings, name, folder, allow_remote_code=parsed.allow_remote_code)


def show_models(settings: Settings, _: argparse.Namespace) -> None:
    database = Database(database_url(settings))
    try:
        with database.transaction() as session:
            for model in models.list_models(session):
                _say(f"{model.name}\t{model.architecture}\t{model.parameters}\t{model.weights}")
    finally:
        database.close()


def import_adapter(settings: Settings, parsed: argparse.Namespace) -> None:
    version = imports.import_adapter(settings, parsed)
    _say(f"{version.adapter_id}: version {version.version} is imported; POST /adapters/{version.adapter_id}/deploy serves it")


def create_key(settings: Settings, parsed: argparse.Namespace) -> None:
    lifetime = None if parsed.expires_days is None else timedelta(days=parsed.expires_days)
    scopes = [scope.strip() for scope in parsed.scopes.split(",") if scope.strip()]
    database = Database(database_url(settings))
    try:
        with database.transaction() as session:
            key, token = keys.create_key(
                session, settings.pepper, DEFAULT_PROJECT, name=parsed.name, scopes=scopes, lifetime=lifetime
            )
            audit.record(session, DEFAULT_PROJECT, None, "key.create", key.id, name=key.name, scopes=key.scopes)
    finally:
        database.close()
    _say(f"{key.id} (shown this once):", sys.stderr)
    _say(token)


def show_keys(settings: Settings, _: argparse.Namespace) -> None:
    database = Database(database_url(settings))
    try:
        with database.transaction() as session:
            for key in keys.list_keys(session, DEFAULT_PROJECT):
                state = "revoked" if key.revoked_at else f"until {key.expires_at:%Y-%m-%d}" if key.expires_at else "valid"
                used = f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never used"
                _say(f"{key.id}\t{key.name}\t{','.join(key.scopes)}\t{state}\t{used}")
    finally:
        database.close()


def revoke_key(settings: Settings, parsed: argparse.Namespace) -> None:
    database = Database(database_url(settings))
    try:
        with database.transaction() as session:
            keys.revoke_key(session, parsed.key_id)
            audit.record(session, DEFAULT_PROJECT, None, "key.revoke", parsed.key_id)
    finally:
        database.close()
    _say(f"{parsed.key_id} is revoked")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m store.admin", description="The operator's commands.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("init", help="make the pepper, the default project and the first key").set_defaults(command=init)
    commands.add_parser("migrate", help="bring the database to the newest schema").set_defaults(command=migrate)

    of_models = commands.add_parser("models", help="base models").add_subparsers(required=True, metavar="COMMAND")
    of_models.add_parser("scan", help="register every folder of STROP_MODELS").set_defaults(command=scan_models)
    of_models.add_parser("list", help="name, architecture, parameters, weights").set_defaults(command=show_models)
    add = of_models.add_parser("add", help="register a folder, or a model of the hub (with STROP_HUB=1)")
    add.add_argument("source", metavar="PATH|HUB_ID")
    add.add_argument("--name", help="registered name; default: the folder's, or the hub id")
    add.add_argument("--revision", default="main", help="of the hub; pinned to the commit it means now")
    add.add_argument(
        "--allow-remote-code",
        action="store_true",
        help="the Python files in the model's folder may run on workers and endpoints; for architectures strop doesn't know",
    )
    add.set_defaults(command=add_model)

    of_adapters = commands.add_parser("adapters", help="adapters").add_subparsers(required=True, metavar="COMMAND")
    bring = of_adapters.add_parser("import", help="take over a LoRA adapter that peft saved; needs the engine installed")
    bring.add_argument("folder", metavar="FOLDER", help="with adapter_config.json and adapter_model.safetensors")
    bring.add_argument("--base", required=True, help="registered name of the model it was trained on")
    bring.add_argument("--name", help="of the adapter; default: the folder's. A known name gets a new version")
    bring.add_argument("--project", default=DEFAULT_PROJECT)
    bring.add_argument("--quantization", choices=get_args(Quantization), default="none", help="of the base, in training")
    bring.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the base, in training")
    bring.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to measure it on")
    bring.add_argument("--texts", metavar="FILE", help="a text a line, to measure it on; default: a few built-in ones")
    bring.set_defaults(command=import_adapter)

    of_keys = commands.add_parser("keys", help="API keys").add_subparsers(required=True, metavar="COMMAND")
    of_keys.add_parser("list", help="id, name, scopes, state, last use").set_defaults(command=show_keys)
    create = of_keys.add_parser("create", help="make a key and print it, once")
    create.add_argument("--name", required=True)
    create.add_argument("--scopes", required=True, help=f"comma separated, out of: {', '.join(keys.SCOPES)}")
    create.add_argument("--expires-days", type=float)
    create.set_defaults(command=create_key)
    revoke = of_keys.add_parser("revoke", help="end a key now")
    revoke.add_argument("key_id")
    revoke.set_defaults(command=revoke_key)
    return parser


def _make_pepper(settings: Settings) -> None:
    path = settings.pepper_file or settings.home / "pepper"
    if not path.exists():
        _write_secret(path, secrets.token_hex(32))


def _write_secret(path: Path, secret: str) -> bool:
    """0600 from its first byte on, whole or not there. False when another process was first: nothing is ever replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # a rename would replace
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def _bring(settings: Settings, source: Path, name: str | None, allow_remote_code: bool) -> tuple[Path, str]:
    root = settings.models_folder
    if source.absolute().is_relative_to(root):
        inside = source.absolute().relative_to(root).as_posix()
        return source.absolute(), name or inside
    name = name or source.resolve().name
    folder = _free_folder(root, name)
    read_model_facts(source, allow_remote_code=allow_remote_code)  # says what is wrong before gigabytes are copied
    _copy(source, folder)
    return folder, name


def _fetch(settings: Settings, hub_id: str, revision: str, name: str | None, allow_remote_code: bool) -> tuple[Path, str]:
    if not settings.hub:
        raise InvalidInput(f"{hub_id} is no folder, and the hub is closed (STROP_HUB=1 opens it)")
    from huggingface_hub import HfApi, snapshot_download  # comes with the engine's extra; the service never needs it

    name = name or hub_id
    folder = _free_folder(settings.models_folder, name)
    commit = HfApi().model_info(hub_id, revision=revision).sha
    wanted = [*_HUB_FILES, "*.py"] if allow_remote_code else list(_HUB_FILES)
    with tempfile.TemporaryDirectory(dir=settings.models_folder, prefix=".hub-") as temporary:
        snapshot_download(hub_id, revision=commit, local_dir=temporary, allow_patterns=wanted)
        shutil.rmtree(Path(temporary, ".cache"), ignore_errors=True)
        Path(temporary, "hub_commit").write_text(f"{hub_id}@{commit}\n")
        read_model_facts(Path(temporary), allow_remote_code=allow_remote_code)
        _copy(Path(temporary), folder)
    return folder, name


def _free_folder(root: Path, name: str) -> Path:
    _check_name(name)
    folder = root / name
    if folder.exists():
        raise InvalidInput(f"{folder} exists already: run `models scan`, or choose another --name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _copy(source: Path, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.copytree(source, temporary)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the worker's and the endpoint's users read it too
    temporary.chmod(0o755)
    temporary.rename(folder)


def _register(settings: Settings, name: str, folder: Path, *, allow_remote_code: bool = False) -> None:
    _check_name(name)
    relative = folder.relative_to(settings.models_folder).as_posix()
    database = Database(database_url(settings))
    try:
        with database.transaction() as session:
            was_allowed = models.allows_remote_code(session, name)  # for the code of then: other code is refused below
        facts = read_model_facts(folder, allow_remote_code=allow_remote_code or was_allowed)
        detail = {"name": name, "weights": facts.weights, "allow_remote_code": facts.allow_remote_code}
        with database.transaction() as session:
            model, is_new = models.register_model(session, name, relative, facts)
            if is_new or facts.allow_remote_code != was_allowed:
                audit.record(session, DEFAULT_PROJECT, None, "model.register", model.id, **detail)
    finally:
        database.close()
    code = ", runs its own code" if facts.allow_remote_code else ""
    _say(f"{name}: {'registered' if is_new else 'known'} ({facts.architecture}, {facts.parameters} parameters{code})")
    if allow_remote_code and not facts.allow_remote_code:
        _say(f"{name}: strop knows {facts.architecture}, so the code in its folder is not used")


def _check_name(name: str) -> None:
    if not models.NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} can't be a model's name: letters, digits, '.', '_', '-' and at most one slash")


def _say(line: str, stream: TextIO | None = None) -> None:
    print(line, file=stream or sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
