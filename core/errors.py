"""Every exception strop raises on purpose.

    StropError
      UserError              the caller can mend it; carries a list of problems, all of them at once
        InvalidInput         422  well-formed but wrong
        Unparsable           400  not even well-formed
        Unauthenticated      401
        Forbidden            403
        NotFound             404  not there, or not yours: the same answer
        Conflict             409  the thing's state forbids it
        TooLarge             413
        Unavailable          503  try again later
      FenceLost              another attempt owns the job now: stop writing, kill the child
      ArtifactError          a folder does not match its manifest
      RunError               what a training child may end with; carries the Reason
        BadSpec, BadData, NoTrainableTokens, Diverged, CudaOutOfMemory, Stopped
        Doomed               nothing good can come of further steps; knows the first bad one
          LossIsZero, GradientExploded, LossStuck

A new error is a class here, and a line in `api/errors.py` when it gets a status of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from core.states import Reason


@dataclass(frozen=True)
class Problem:
    """One thing wrong, and where. `pointer` is a JSON pointer into the body (RFC 6901); `row` and `line` count from 1."""

    code: str
    message: str
    pointer: str | None = None
    row: int | None = None
    line: int | None = None
    field: str | None = None


class StropError(Exception):
    """Root of the tree."""


class UserError(StropError):
    """The caller's mistake. `problems` names every reason, so that one round trip is enough to mend it."""

    title: ClassVar[str] = "The request can't be carried out"
    code: ClassVar[str] = "invalid-request"

    def __init__(self, detail: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.problems = tuple(problems)


class InvalidInput(UserError):
    title = "The request is well-formed but wrong"
    code = "invalid-input"


class Unparsable(UserError):
    title = "The request can't be read"
    code = "unparsable"


class Unauthenticated(UserError):
    title = "No valid API key"
    code = "unauthenticated"


class Forbidden(UserError):
    title = "The API key lacks the scope"
    code = "forbidden"


class NotFound(UserError):
    title = "Not found"
    code = "not-found"


class Conflict(UserError):
    title = "The present state forbids it"
    code = "conflict"


class TooLarge(UserError):
    title = "Too large"
    code = "too-large"


class Unavailable(UserError):
    title = "Not available right now"
    code = "unavailable"


class FenceLost(StropError):
    """A guarded write touched no row: the lease ran out and another attempt, or nobody, owns the job."""


class ArtifactError(StropError):
    """A folder is incomplete or differs from its manifest; it is never resumed from or served."""


class RunError(StropError):
    """Ends a training child with the exit code of its reason; the message reaches the user."""

    reason: ClassVar[Reason] = Reason.INTERNAL_ERROR


class BadSpec(RunError):
    reason = Reason.BAD_SPEC


class BadData(RunError):
    reason = Reason.BAD_DATA


class NoTrainableTokens(RunError):
    reason = Reason.NO_TRAINABLE_TOKENS


class Diverged(RunError):
    reason = Reason.NUMERICAL_DIVERGENCE


class Doomed(RunError):
    """A run whose further steps are wasted. `since` is the first step of what was wrong."""

    def __init__(self, message: str, since: int) -> None:
        super().__init__(message)
        self.since = since


class LossIsZero(Doomed):
    reason = Reason.LOSS_IS_ZERO


class GradientExploded(Doomed):
    reason = Reason.GRADIENT_EXPLOSION


class LossStuck(Doomed):
    reason = Reason.LOSS_DOES_NOT_MOVE


class CudaOutOfMemory(RunError):
    reason = Reason.CUDA_OOM


class Stopped(RunError):
    """The supervisor asked for a stop and a checkpoint was written."""

    reason = Reason.DRAINED
