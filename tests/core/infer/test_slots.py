"""Room for adapters on a GPU: what lies where, who stays, and who leaves. On a CPU, where every copy has arrived at once."""

import pytest
import torch

from core.infer.gpu.slots import DeviceSlots
from core.infer.lora import LoraWeights, Site

GROUPS = [
    [("first", torch.nn.Linear(8, 12)), ("second", torch.nn.Linear(8, 4))],
    [("third", torch.nn.Linear(12, 8, bias=False))],
]
SHAPES = {path: (module.out_features, module.in_features) for group in GROUPS for path, module in group}


def slots_of(pages: int) -> DeviceSlots:
    one = DeviceSlots(GROUPS, torch.device("cpu"), torch.float32, gib=0)
    return DeviceSlots(GROUPS, torch.device("cpu"), torch.float32, gib=(pages + 0.5) * one.layout.elements * 4 / 2**30)


def adapter(slots: DeviceSlots, ranks: dict[str, int], seed: int = 0, gain: bool = False) -> tuple[LoraWeights, dict[str, Site]]:
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for path, rank in ranks.items():
        outputs, inputs = SHAPES[path]
        down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
        sites[path] = Site(down, up, torch.rand(outputs, generator=generator) if gain else None)
    staged = slots.staged(ranks, sites.items())
    assert staged is not None
    return LoraWeights(str(seed), {path: site.kind for path, site in sites.items()}, {}, staged), sites


def product(slots: DeviceSlots, number: int, path: str) -> torch.Tensor:
    """up · down of a module, as kernels find it in a slot."""
    pool = slots.pool
    at, part = slots.layout.places[path]
    site = slots.layout.sites[at]
    begin = sum(site.outputs[:part])
    total = torch.zeros(SHAPES[path])
    for page in pool.pages[number, : int(pool.counts[number, at])].tolist():
        content = pool.memory[page]
        down = content[site.down_at :][: len(site.outputs) * 16 * site.inputs].view(-1, 16, site.inputs)[part]
        up = content[site.up_at :][: sum(site.outputs) * 16].view(-1, 16)[begin : begin + site.outputs[part]]
        total += up @ down
    return total


def test_every_rank_lies_where_kernels_look_for_it() -> None:
    slots = slots_of(6)
    made = [
        adapter(slots, {"first": 4, "second": 16, "third": 24}, 1),
        adapter(slots, {"second": 40}, 2, gain=True),
        adapter(slots, {"first": 16, "second": 16, "third": 16}, 3),
    ]
    numbers = [slots.number(weights) for weights, _ in made]
    assert len(set(numbers)) == 3
    for number, (_, sites) in zip(numbers, made, strict=True):
        for path in SHAPES:
            expected = sites[path].up @ sites[path].down if path in sites else torch.zeros(SHAPES[path])
            torch.testing.assert_close(product(slots, number, path), expected)
    gains = slots.pool.gains
    assert gains is not None
    second = slots.layout.sites[0].gains_at + 12
    gain = made[1][1]["second"].gain
    assert gain is not None
    assert torch.equal(gains[numbers[1], second : second + 4], gain)
    assert torch.equal(gains[numbers[2]], torch.ones_like(gains[0])), "an adapter without gains"
    alone = slots.alone(made[1][0])
    assert torch.equal(alone.memory, made[1][0].staged.pages)


def test_who_is_asked_stays_and_the_longest_unasked_leaves() -> None:
    slots = slots_of(3)
    one, two, three, wide = (adapter(slots, {"first": rank}, rank)[0] for rank in (1, 2, 3, 17))
    for weights in (one, two, three):
        assert slots.ask(weights) == "here"
    slots.hold(one)
    assert slots.ask(two) == "here"
    assert slots.ask(wide) == "here", "two and three make room, one is held"
    assert [weights.staged.is_resident for weights in (one, two, three, wide)] == [True, False, False, True]
    slots.hold(wide)
    assert slots.ask(two) == "no-room"
    with pytest.raises(RuntimeError, match="no room for another"):
        slots.number(two)
    slots.let_go(wide)
    assert slots.ask(two) == "here"
    assert [(weights.staged.loads, weights.staged.evictions) for weights in (one, two, wide)] == [(1, 0), (2, 1), (1, 1)]
    slots.forget(two)
    slots.prefetch(three)
    assert slots.resident == 2
    slots.prefetch(wide)
    assert not wide.staged.is_resident, "nobody leaves for one that was not asked"


def test_a_rank_beyond_all_room_is_for_peft() -> None:
    slots = slots_of(2)
    assert slots.staged({"first": 33}, []) is None
    assert slots.staged({"first": 32}, []) is not None
