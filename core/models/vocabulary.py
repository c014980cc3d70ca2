"""New tokens in a model: rows of input embedding and output head that the base does not have, and their training.

A row begins as the mean of the rows of the pieces that the token's text was made of before: near what the model already knows
of it, and the same in every run. Full tuning trains the longer matrices as they are. Beside an adapter the rows alone are
trained, in fp32, and stand in for the base's until the result is written. (peft's trainable_token_indices copies the whole
matrix in every pass, for each chunk of the head, and leaves out the bias that Phi's head has.)
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from core.models.embeddings import embedding_paths


def extend_vocabulary(model: Any, pieces: Mapping[int, Sequence[int]]) -> None:
    """Give a plain model a row for each new id, made of the rows of its pieces. Rows it has to spare are used first.

    Raises BadSpec where transformers can't name embedding and head.
    """
    embedding_paths(model, "data.new_tokens")
    if (size := 1 + max(pieces)) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(size, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = {id(tensor): tensor for tensor in (embedding.weight, head.weight, getattr(head, "bias", None))}  # tied ones once
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor is not None:
                means = [tensor[list(old)].float().mean(dim=0) for old in pieces.values()]
                tensor[list(pieces)] = torch.stack(means).to(tensor.dtype)


def install_rows(model: Any, first: int, count: int) -> None:
    """Let the rows of a frozen model's ids first .. first + count - 1 be trained, as one matrix where embedding and head are."""
    paths = embedding_paths(model, "data.new_tokens")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = torch.nn.Parameter(embedding.weight[first : first + count].to(torch.float32, copy=True))
    tied = head.weight is embedding.weight
    head_rows = rows if tied else torch.nn.Parameter(head.weight[first : first + count].to(torch.float32, copy=True))
    for path, module in zip(paths, (NewRowsEmbedding(embedding, rows, first), NewRowsHead(head, head_rows, first)), strict=True):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


class NewRowsEmbedding(torch.nn.Module):
    """An embedding whose rows first, first + 1, ... are looked up among rows that train."""

    def __init__(self, inner: torch.nn.Embedding, rows: torch.nn.Parameter, first: int) -> None:
        super().__init__()
        self.inner = inner
        # The same kind of lookup over a table of its own: some families scale what they look up.
        self.new = copy.copy(inner)
        self.new._parameters = {"weight": rows}
        self.new.padding_idx = None
        self.first = first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        known = self.inner(ids)
        place = ids - self.first
        last = len(self.new.weight) - 1
        is_new = (place >= 0) & (place <= last)
        return torch.where(is_new[..., None], self.new(place.clamp(0, last)).to(known.dtype), known)


class NewRowsHead(torch.nn.Module):
    """An output head whose logits of the ids first, first + 1, ... come from rows that train."""

    def __init__(self, inner: torch.nn.Linear, rows: torch.nn.Parameter, first: int) -> None:
        super().__init__()
        self.inner = inner
        self.rows = rows
        self.first = first

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        end = self.first + len(self.rows)
        known = self.inner(hidden)
        bias = None if self.inner.bias is None else self.inner.bias[self.first : end]
        new = functional.linear(hidden, self.rows.to(hidden.dtype), bias)
        return torch.cat([known[..., : self.first], new.to(known.dtype), known[..., end:]], dim=-1)


def remove_rows(model: Any) -> None:
    """Write trained rows into the model's own matrices, in their dtype, and put these back in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, NewRowsEmbedding | NewRowsHead):
            rows = module.new.weight if isinstance(module, NewRowsEmbedding) else module.rows
            with torch.no_grad():
                module.inner.weight[module.first : module.first + len(rows)] = rows.to(module.inner.weight.dtype)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.inner)
