"""`adapters import`: a version of an adapter that peft trained elsewhere, by the operator's hand.

The work with the model is done by `core.train.adopt` in a process of its own, since this one knows no torch: the command needs
the engine installed, as workers and endpoints have it. What it leaves is verified and stored like a job's result, and deployed
like one.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from core.adapter import ADAPTER_KIND, AdapterFacts
from core.errors import Conflict, InvalidInput, NotFound
from core.manifest import folder_bytes, folder_digest, verify_folder
from core.model_folder import verify_code
from core.spec import AdapterName
from store import audit, models
from store.adapters import add_version
from store.db import Database, database_url
from store.files import Storage, adapter_key
from store.settings import Settings
from store.tables import AdapterVersion, Project

ADOPT_COMMAND = (sys.executable, "-m", "core.train.adopt")
"""FOLDER BASE OUT and options follow."""


def import_adapter(settings: Settings, parsed: argparse.Namespace) -> AdapterVersion:
    """Check, measure and record the adapter in `parsed.folder`; returns its version, which is not deployed yet.

    Raises InvalidInput with the reasons of a refusal, NotFound for an unknown base or project, Conflict for a name that is
    a model's.
    """
    source = Path(parsed.folder)
    name = parsed.name or source.resolve().name.lower()
    try:
        TypeAdapter(AdapterName).validate_python(name)
    except ValidationError:
        raise InvalidInput(f"{name!r} can't be an adapter's name: give one by --name (a-z, digits, '.', '_', '-')") from None
    if not source.is_dir():
        raise InvalidInput(f"{source} is no folder")
    database = Database(database_url(settings))
    try:
        with database.transaction() as session:
            if session.get(Project, parsed.project) is None:
                raise NotFound(f"There is no project {parsed.project}")
            if name in {model.name for model in models.list_models(session)}:
                raise Conflict(f"{name} is the name of a model; an adapter needs another")
            model = models.find_model(session, parsed.base)
        base_folder = settings.models_folder / model.folder
        if model.allow_remote_code:
            verify_code(base_folder, model.config)
        settings.scratch_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.scratch_folder, prefix="import-") as temporary:
            output = Path(temporary, "adapter")
            options = ["--model", model.name, "--weights", model.weights]
            options += ["--quantization", parsed.quantization, "--precision", parsed.precision, "--device", parsed.device]
            options += ["--allow-remote-code"] if model.allow_remote_code else []
            options += ["--texts", parsed.texts] if parsed.texts else []
            done = subprocess.run(
                [*ADOPT_COMMAND, str(source), str(base_folder), str(output), *options], stderr=subprocess.PIPE, text=True
            )
            if done.returncode != 0:
                raise InvalidInput(f"{source.name} is not imported: {done.stderr.strip()}")
            facts = AdapterFacts.model_validate(verify_folder(output, ADAPTER_KIND))
            sha256, size = folder_digest(output), folder_bytes(output)
            Storage(settings.storage, settings.scratch_folder).publish_folder(output, adapter_key(sha256))
        with database.transaction() as session:
            version = add_version(session, parsed.project, name, job_id=None, sha256=sha256, size=size, facts=facts)
            detail = {"version": version.version, "sha256": sha256, "base": str(facts.base)}
            audit.record(session, parsed.project, None, "adapter.import", version.adapter_id, **detail)
    finally:
        database.close()
    return version
