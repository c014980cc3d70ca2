"""How adapters lie in a GPU's memory: what is copied there (`slots.py`) and what kernels read (`low_rank.py`)."""

from dataclasses import dataclass

import torch

RANKS = 16
"""Ranks of a page."""


@dataclass(frozen=True)
class Pool:
    """Adapters on the device. `memory` [pages, elements of a page], contiguous, in the dtype that is multiplied.

    `pages` int32 [slots, most pages of an adapter]; `counts` int32 [slots, sites]: pages that a slot has at a site, 0 where
    it does nothing there; `gains` fp32 [slots, outputs of all sites], None where no adapter has any.
    """

    memory: torch.Tensor
    pages: torch.Tensor
    counts: torch.Tensor
    gains: torch.Tensor | None


@dataclass(frozen=True)
class SiteShape:
    """Where a site's weights lie in each page: `down` [parts, 16, inputs], then `up` [outputs of all parts, 16]."""

    number: int
    inputs: int
    outputs: tuple[int, ...]
    """Of each part."""
    down_at: int
    up_at: int
    gains_at: int
