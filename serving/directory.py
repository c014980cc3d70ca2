"""What a request's `model` means right now: names to what is in memory, each tenant seeing its own and the bases.

Written by the thread that follows deployments, read by every request. A name is resolved once, when the request comes in, to
one immutable version.
"""

import threading
from dataclasses import dataclass
from datetime import datetime

from core.errors import NotFound, Problem, Unavailable
from core.infer.lora import LoraWeights
from core.infer.servable import Servable
from store.deployments import DesiredVersion

VersionKey = tuple[str, int]
"""(adapter id, version)."""


@dataclass(frozen=True)
class Loading:
    """Wanted, and on its way."""


@dataclass(frozen=True)
class NotServed:
    """It failed a check. `wanted_at` is the wish that was answered so; a later wish is tried again."""

    reason: str
    wanted_at: datetime
    is_passing: bool  # a fault of the surroundings: tried again without being asked


Standing = Loading | NotServed | Servable


@dataclass(frozen=True)
class Resolved:
    """`name` says exactly what answers: a base, or `adapter@version`."""

    name: str
    servable: Servable


@dataclass(frozen=True)
class Listed:
    """One line of the model list."""

    id: str
    root: str  # name of the base
    is_base: bool


class Directory:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bases: dict[str, Servable] = {}
        self._versions: dict[VersionKey, tuple[DesiredVersion, Standing]] = {}

    def add_base(self, word: str, servable: Servable) -> None:
        """A base answers to its whole word in STROP_BASES, and the first of a model to the model's name too."""
        with self._lock:
            self._bases.setdefault(servable.host.identity.model, servable)
            self._bases.setdefault(word, servable)

    def put(self, version: DesiredVersion, standing: Standing) -> None:
        with self._lock:
            self._versions[version.adapter_id, version.version] = (version, standing)

    def remove(self, key: VersionKey) -> Standing:
        with self._lock:
            return self._versions.pop(key)[1]

    def standings(self) -> dict[VersionKey, Standing]:
        with self._lock:
            return {key: standing for key, (_, standing) in self._versions.items()}

    @property
    def bases(self) -> list[Servable]:
        """Each base in memory once, in the order of STROP_BASES."""
        with self._lock:
            return list(dict.fromkeys(self._bases.values()))

    def resolve(self, project_id: str, name: str) -> Resolved:
        """The base, adapter name, adapter id, or either with `@version`, as the project sees it; without a version the
        latest that can be served. Raises NotFound (the same for what is another's), or Unavailable while it loads."""
        with self._lock:
            if name in self._bases:
                return Resolved(name, self._bases[name])
            wanted, _, number = name.partition("@")
            candidates = [
                (version, standing)
                for version, standing in self._versions.values()
                if version.project_id == project_id
                and wanted in (version.name, version.adapter_id)
                and (number == str(version.version) if "@" in name else True)
            ]
        candidates.sort(key=lambda entry: entry[0].version, reverse=True)
        for version, standing in candidates:
            if isinstance(standing, Servable):
                return Resolved(str(version), standing)
        if any(isinstance(standing, Loading) for _, standing in candidates):
            raise Unavailable(f"The model {name!r} is being loaded", [Problem("model-loading", "try again", pointer="/model")])
        for version, standing in candidates:
            if isinstance(standing, NotServed):
                message = f"{version} is deployed, but this endpoint does not serve it: {standing.reason}"
                raise NotFound(message, [Problem("model-not-found", message, pointer="/model")])
        message = f"There is no model {name!r} here, or it is not deployed"
        raise NotFound(message, [Problem("model-not-found", message, pointer="/model")])

    def is_base(self, name: str) -> bool:
        with self._lock:
            return name in self._bases

    def labels(self) -> list[tuple[str, str]]:
        """(project id, name) of every version that can be asked, and ("", name) of every base."""
        with self._lock:
            lines = [("", name) for name in self._bases]
            versions = self._versions.values()
            return lines + [
                (version.project_id, str(version)) for version, standing in versions if isinstance(standing, Servable)
            ]

    def adapters(self) -> list[tuple[tuple[str, str], LoraWeights]]:
        """(label, adapter) of every version that packed steps answer."""
        with self._lock:
            return [
                ((version.project_id, str(version)), standing.weights)
                for version, standing in self._versions.values()
                if isinstance(standing, Servable) and standing.weights is not None
            ]

    def listing(self, project_id: str) -> list[Listed]:
        """Bases, then the project's adapters: each name once for its latest version, and each version."""
        with self._lock:
            lines = [Listed(name, servable.host.identity.model, True) for name, servable in self._bases.items()]
            mine = [
                (version, standing.host.identity.model)
                for version, standing in self._versions.values()
                if version.project_id == project_id and isinstance(standing, Servable)
            ]
        mine.sort(key=lambda entry: (entry[0].name, entry[0].version))
        latest = {version.name: root for version, root in mine}
        lines += [Listed(name, root, False) for name, root in latest.items()]
        lines += [Listed(str(version), root, False) for version, root in mine]
        return lines
