"""The registry of base models: what the operator registered (`store/admin.py`), read by every process. Never written over REST.

A name belongs to one set of weights for ever, and to one state of the model's own code where it runs any: adapters are bound
to both, and the operator allowed no other code.
"""

import re

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from core.catalog import REMOTE_CODE
from core.errors import Conflict, NotFound
from core.model_folder import ModelFacts
from core.records import ModelRecord
from store.ids import new_id
from store.tables import Adapter, Model

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", re.ASCII)
"""What `base_model` of a spec may hold."""


def register_model(session: Session, name: str, folder: str, facts: ModelFacts) -> tuple[Model, bool]:
    """The model under `name` and whether it is new; `folder` is relative to STROP_MODELS. Registering again is no error.

    A changed tokenizer, template or config is taken over; changed weights or code are refused. Raises Conflict, with both
    digests.
    """
    # Two scans at once (two API hosts over one volume) must not both find the name free.
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('model:' || :name, 0))"), {"name": name})
    model = session.scalar(select(Model).where(Model.name == name))
    if model is None:
        taken = session.scalar(select(Adapter.id).where(Adapter.name == name))
        if taken is not None:
            raise Conflict(f"{name} is the name of adapter {taken}, and a model's name is never equal to an adapter's")
        model = Model(id=new_id("mdl"), name=name, folder=folder, **facts.model_dump())
        session.add(model)
        session.flush()
        session.refresh(model)
        return model, True
    if model.weights != facts.weights:
        raise Conflict(
            f"{name} is registered with weights {model.weights}, and the folder {folder} holds {facts.weights}: "
            f"adapters are bound to the weights, so register the changed model under another name"
        )
    allowed, found = (config.get(REMOTE_CODE, {}).get("code") for config in (model.config, facts.config))
    if allowed and found and allowed != found:
        raise Conflict(
            f"{name} is registered with code {allowed}, and the Python files in {folder} have the digest {found}: "
            f"read what changed, and register the model under another name"
        )
    for column, value in facts.model_dump().items():
        setattr(model, column, value)
    model.folder = folder
    session.flush()
    return model, False


def find_model(session: Session, name: str) -> Model:
    """The model registered under a name. Raises NotFound."""
    model = session.scalar(select(Model).where(Model.name == name))
    if model is None:
        raise NotFound(f"There is no model {name}")
    return model


def allows_remote_code(session: Session, name: str) -> bool:
    """The operator has allowed the model under this name to run its own code. False where there is no such model."""
    return bool(session.scalar(select(Model.allow_remote_code).where(Model.name == name)))


def list_models(session: Session) -> list[Model]:
    """All models, by name."""
    return list(session.scalars(select(Model).order_by(Model.name)))


def model_facts(model: Model) -> ModelFacts:
    return ModelFacts(**{field: getattr(model, field) for field in ModelFacts.model_fields})


def model_record(model: Model) -> ModelRecord:
    return ModelRecord(
        id=model.id,
        name=model.name,
        family=model.architecture,
        parameters=model.parameters,
        context_length=model.context_length,
        weights=model.weights,
        has_chat_template=model.has_chat_template,
        created_at=model.created_at,
    )
