"""What is recorded for a size of batch stands for every batch that is rounded up to it.

There is nothing to record on a CPU: here the work itself is done again, over the same buffers, rows of padding and gradients.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.eval.rows import MicroBatch, collate_packed
from core.spec import SftObjective
from core.train.fused.graphs import Recorder, Size, Work
from core.train.fused.install import fused_layer, install_fused, install_graphs, uninstall_fused, uninstall_graphs
from core.train.losses import token_loss
from tests.core.train.fused import CPU, FAMILIES, Folders, adapted, assert_same, base_of, examples, folders_in, measured, packed

BATCHES = [(1, 6, 40), (2, 3, 20), (3, 6, 40), (4, 50, 40), (5, 2, 16)]
"""Seed, rows and longest of examples."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return folders_in(tmp_path_factory.mktemp)


class Recorded:
    """How often work was recorded, and does it again as it is."""

    def __init__(self) -> None:
        self.count = self.made = 0

    def __call__(self, device: torch.device) -> Recorder:
        self.made += 1

        def record(work: Work) -> Work:
            self.count += 1
            return work

        return record


def batches() -> list[MicroBatch]:
    return [collate_packed(examples(seed, count, longest), CPU) for seed, count, longest in BATCHES]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_layers_one_by_one(folders: Folders, family: str) -> None:
    model = adapted(base_of(folders(family)))
    install_fused(model)
    expected = [measured(model, batch=batch) for batch in batches()]
    recorded = Recorded()
    install_graphs(model, recorded)
    counts = []
    for _ in range(3):
        for batch, wanted in zip(batches(), expected, strict=True):
            assert_same(measured(model, batch=batch), wanted)
        counts.append(recorded.count)
    sizes = {Size.of(batch.tokens, batch.sequences, 40) for batch in batches()}
    assert 1 < len(sizes) < len(BATCHES)
    assert counts[1] - counts[0] < 2 * len(sizes), "what the largest took with it"
    assert counts[2] == counts[1], "forward and backward of every size are there"
    uninstall_graphs(model)
    assert_same(measured(model, batch=batches()[0]), expected[0])


def all_of_it(base: Any) -> Any:
    return packed(base.requires_grad_(True))


@pytest.mark.parametrize("build", [adapted, all_of_it], ids=["lora", "full"])
def test_gradients_add_up_over_a_step_and_begin_anew_with_the_next(folders: Folders, build: Callable[[Any], Any]) -> None:
    model = build(base_of(folders("llama")))
    install_fused(model)

    def summed(model: Any, some: list[MicroBatch]) -> dict[str, torch.Tensor]:
        for batch in some:
            token_loss(model, batch, SftObjective()).sums.sum().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    steps = [batches()[:3], batches()[3:], batches()[:1]]
    expected = [summed(model, step) for step in steps]
    install_graphs(model, Recorded())
    for step, wanted in zip(steps, expected, strict=True):
        found = summed(model, step)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_weights_that_change_are_seen(folders: Folders) -> None:
    model = adapted(base_of(folders("llama")))
    install_fused(model)
    install_graphs(model, Recorded())
    (batch, *_) = batches()
    first = measured(model, batch=batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    second = measured(model, batch=batch)
    assert not torch.equal(first.sums, second.sums)
    uninstall_graphs(model)
    assert_same(second, measured(model, batch=batch))


def test_a_larger_batch_than_any_before_takes_new_memory_and_the_graphs_of_the_old_are_dropped(folders: Folders) -> None:
    model = adapted(base_of(folders("llama")))
    install_fused(model)
    small, large = collate_packed(examples(1, 3, 20), CPU), collate_packed(examples(4, 50, 40), CPU)
    expected = measured(model, batch=small), measured(model, batch=large)
    recorded = Recorded()
    install_graphs(model, recorded)
    for batch, wanted in ((small, expected[0]), (large, expected[1]), (small, expected[0])):
        assert_same(measured(model, batch=batch), wanted)
    assert recorded.count == 3 * 2, "forward and backward, and the small one a second time"


def test_what_is_no_training_goes_its_own_way(folders: Folders) -> None:
    model = adapted(base_of(folders("llama")))
    install_fused(model)
    recorded = Recorded()
    install_graphs(model, recorded)
    (batch, *_) = batches()
    with torch.no_grad():
        nats = token_loss(model, batch, SftObjective()).sums
    with model.disable_adapter():
        base = token_loss(model, batch, SftObjective()).sums
    assert recorded.count == 0
    torch.testing.assert_close(measured(model, batch=batch).sums, nats)
    assert not torch.equal(base, nats)


def test_sizes_are_few_and_little_larger_than_what_they_hold() -> None:
    for tokens in (1, 63, 64, 1040, 8062, 16_181, 131_072):
        size = Size.of(tokens, 126, 400)
        assert tokens <= size.tokens <= max(tokens + tokens // 16, tokens // 128 * 128 + 128)
        assert size.rows > 126, "one more, of padding"
        assert size.longest >= max(400, size.tokens - tokens)
    assert len({Size.of(tokens, 126, 400) for tokens in range(15_000, 17_000)}) <= 9


def test_graphs_need_fused_layers(folders: Folders, tmp_path: Path) -> None:
    model = adapted(base_of(folders("llama")))
    with pytest.raises(ValueError, match="not fused"):
        install_graphs(model, Recorded())
    install_fused(model)
    assert fused_layer(model.get_base_model().get_decoder().layers[0]) is not None
    uninstall_fused(model)
    with pytest.raises(ValueError, match="not fused"):
        install_graphs(model, Recorded())
