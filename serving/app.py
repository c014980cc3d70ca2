"""The inference endpoint: `uvicorn serving.app:create_app --factory`.

Starts at once, loads its bases in the background (`/readyz` is red until then), and serves what the control plane has
deployed once it has proven to be what was trained. Reads the record; writes its own row and its receipts.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from core.infer.engine import GPU_STEP_TOKENS, STEP_TOKENS, Engine
from core.models.load import pick_device
from serving.access import Serving
from serving.bases import Room, resolve_bases
from serving.body_limit import BodyLimit
from serving.deployments import Follower, Signature
from serving.directory import Directory
from serving.errors import install_handlers
from serving.routes import router
from store.db import Database, database_url
from store.files import Storage
from store.ids import new_id
from store.settings import Settings, get_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """The app. Its start fails, with every reason, when STROP_BASES can't be resolved or the pepper is missing."""
    chosen = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pepper, device = chosen.pepper, pick_device("auto")
        database = Database(database_url(chosen), application_name=f"strop {chosen.endpoint_name}")
        try:
            with database.transaction() as session:
                wanted = resolve_bases(session, chosen.bases)
            tokens = GPU_STEP_TOKENS if device.type == "cuda" else STEP_TOKENS
            engine, directory = Engine(running=chosen.serving_running, step_tokens=tokens), Directory()
            follower = Follower(
                wanted=wanted,
                models_folder=chosen.models_folder,
                gpu_gib=chosen.serving_gpu_gib,
                room=Room(chosen.serving_kv_gib, chosen.serving_adapter_gib, chosen.serving_host_gib, chosen.serving_running),
                device=device,
                database=database,
                storage=Storage(chosen.storage, chosen.scratch_folder),
                engine=engine,
                directory=directory,
                signature=Signature(new_id("end"), chosen.endpoint_name),
                poll_seconds=chosen.poll_seconds,
            )
            app.state.serving = Serving(database, pepper, engine, directory, follower, int(time.time()))
            follower.start()
            yield
            follower.stop()
            engine.close()
        finally:
            database.close()

    app: Any = FastAPIOffline(
        title="strop inference",
        summary="Ask base models and the adapters that were trained on them.",
        version="0.1.0",
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit)
    install_handlers(app)
    app.include_router(router)
    served: FastAPI = app
    return served
