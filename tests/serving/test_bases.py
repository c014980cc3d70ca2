"""The base an endpoint loads is the registered one, its own code included."""

from pathlib import Path

import pytest
import torch

from core.catalog import REMOTE_CODE
from core.errors import ArtifactError, InvalidInput
from core.model_folder import read_model_facts
from serving.bases import Room, WantedBase, load_wanted, resolve_bases
from standalone.__main__ import _every_text_model
from store.db import Database
from store.deployments import RegisteredModel
from store.models import register_model
from tests.tiny import build_remote_code_model, build_tiny_clip, build_tiny_model

CPU = torch.device("cpu")


def wanted(folder: Path) -> WantedBase:
    facts = read_model_facts(folder, allow_remote_code=True)
    model = RegisteredModel("toy", folder.name, facts.weights, facts.allow_remote_code, facts.config)
    return WantedBase("toy", model, "none", "fp32")


def test_a_base_with_its_own_code_is_served_as_registered(tmp_path: Path) -> None:
    base = wanted(build_remote_code_model(tmp_path / "toy"))
    servable = load_wanted(base, tmp_path, CPU, room=Room(0.1, 0.1, 0.1, 4))
    assert str(servable.host.identity.weights) == base.model.weights
    ids = torch.arange(3, 9)[None]
    assert servable.host.model(input_ids=ids, use_cache=False).logits.shape == (1, 6, 512)


def test_a_model_of_pictures_is_no_base_yet(database: Database, tmp_path: Path) -> None:
    with database.transaction() as session:
        register_model(session, "clip", "clip", read_model_facts(build_tiny_clip(tmp_path / "clip")))
        with pytest.raises(InvalidInput, match="clip:fp32: clip is a model for task contrastive, which endpoints"):
            resolve_bases(session, ["clip:fp32"])
    build_tiny_model(tmp_path / "tiny")
    assert _every_text_model(tmp_path) == "tiny"


def test_code_that_changed_since_is_not_run(tmp_path: Path) -> None:
    base = wanted(build_remote_code_model(tmp_path / "toy"))
    mark = tmp_path / "it-ran"
    (tmp_path / "toy" / "modeling_toy_glm.py").write_text(f"open({str(mark)!r}, 'w').close()")
    with pytest.raises(ArtifactError, match=base.model.config[REMOTE_CODE]["code"]):
        load_wanted(base, tmp_path, CPU, room=Room(0.1, 0.1, 0.1, 4))
    assert not mark.exists()
