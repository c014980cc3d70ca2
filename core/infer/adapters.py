"""One base in memory: the runner of its packed steps, and the adapters that peft has put on it, of which one or none acts.

peft's way is the slow one, for adapters that packed steps can't express, and the reference that the fast one is held to.
Not safe for two threads: the engine's thread alone loads, activates and runs. Whether an adapter may be served at all is
decided elsewhere (`serving/verify.py`).
"""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel

from core.adapter import BaseIdentity
from core.errors import ArtifactError
from core.infer.runner import ADAPTER_GIB, HOST_GIB, Runner, kv_bytes_per_token, reach_of
from core.models.adapt import load_adapter, unwrap
from core.models.load import LoadedBase


class AdaptedBase:
    """`model` is the plain transformers model: what it computes depends on the last `activate`. `runner` is its fast path,
    None where packed steps can't express the model."""

    def __init__(
        self,
        base: LoadedBase,
        *,
        kv_gib: float = 1.0,
        adapter_gib: float = ADAPTER_GIB,
        host_gib: float = HOST_GIB,
        kernels: bool | None = None,
    ) -> None:
        """`kv_gib` is the room for keys and values; no more than sixteen whole contexts are made of it. `adapter_gib` is that
        for adapters on a GPU, `host_gib` that in pinned memory beside it. `kernels` as `Runner` has it."""
        self.model: Any = base.model
        self.identity: BaseIdentity = base.identity
        self._peft: PeftModel | None = None
        self._active: str | None = None
        self.kv_gib = kv_gib
        self.runner: Runner | None = None
        if reach_of(base.model):
            tokens = int(kv_gib * 2**30) // kv_bytes_per_token(base.model)
            tokens = min(tokens, 16 * base.model.config.max_position_embeddings)
            self.runner = Runner(
                base.model,
                kv_tokens=tokens,
                adapter_gib=adapter_gib,
                host_gib=host_gib,
                make_bare=lambda: self.activate(None),
                kernels=kernels,
            )

    def load(self, folder: Path, adapter: str) -> None:
        """Read an adapter folder onto the base under a new name without dots. Raises ArtifactError, and is as before then."""
        if self._has(adapter):
            raise ValueError(f"there is an adapter {adapter} already")
        try:
            self._peft = load_adapter(self._peft if self._peft is not None else self.model, folder, adapter)
        except Exception as error:
            self._drop(adapter)
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{folder.name}: peft can't load it onto {self.identity}: {error}") from error
        self._switch(self._active)

    def unload(self, adapter: str) -> None:
        """Take an adapter out of memory."""
        if self._active == adapter:
            self.activate(None)
        self._drop(adapter)

    def activate(self, adapter: str | None) -> None:
        """Make the model compute with this adapter; None is the bare base. Raises KeyError for one that is not there."""
        if adapter is not None and not self._has(adapter):
            raise KeyError(f"there is no adapter {adapter} in memory")
        if adapter != self._active:
            self._switch(adapter)

    def _has(self, adapter: str) -> bool:
        return self._peft is not None and adapter in self._peft.peft_config

    def _switch(self, adapter: str | None) -> None:
        if self._peft is not None:
            if adapter is None:
                self._peft.base_model.disable_adapter_layers()
            else:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(adapter, inference_mode=True)
        self._active = adapter

    def _drop(self, adapter: str) -> None:
        if self._peft is not None and set(self._peft.peft_config) - {adapter}:
            if adapter in self._peft.peft_config:
                with warnings.catch_warnings():
                    # peft activates another in its place, and says so; the next line decides that.
                    warnings.filterwarnings("ignore", message=".* was active which is now deleted")
                    self._peft.delete_adapter(adapter)
            self._switch(self._active)
        else:
            # peft changes the model in place even where it raises; a second wrap over its layers would nest them.
            self._peft, self._active = None, None
            unwrap(self.model)
