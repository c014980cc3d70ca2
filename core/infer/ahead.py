"""Tokens that are drawn and that the host does not know yet.

On a GPU the next step is launched before the tokens of this one have been read. A context has a mark in place of such a token:
where among the last drawn ones it stands. The step looks there, on the device, and the host puts the token in place of
the mark once it has read it, which is before another step is launched: so no mark outlives the one drawing it points into.
"""

import torch

MOST = 256
"""Tokens of one drawing that a step may take from the device; where there are more, the host reads them first."""


def mark(row: int) -> int:
    """What stands for the token that was drawn in this row."""
    return -1 - row


def resolved(ids: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """int64 ids of the shape of `ids`, each mark replaced by what it stands for in `drawn`."""
    ids = ids.long()
    return torch.where(ids < 0, drawn.long()[(-1 - ids).clamp(0, len(drawn) - 1)], ids)
