"""Room for adapters on a GPU and beside it: what lies where, who stays, who leaves, and who comes back. On a CPU, where every
copy has arrived at once."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.adapter import ADAPTER_KIND
from core.errors import ArtifactError
from core.infer.gpu.slots import DeviceSlots
from core.infer.lora import LoraSites, LoraWeights, Site
from core.manifest import closed_folder, folder_digest
from core.models.adapt import ADAPTER_WEIGHTS
from core.models.load import LoadedBase
from tests.lora import add_lora

GROUPS = [
    [("first", torch.nn.Linear(8, 12)), ("second", torch.nn.Linear(8, 4))],
    [("third", torch.nn.Linear(12, 8, bias=False))],
]
SHAPES = {path: (module.out_features, module.in_features) for group in GROUPS for path, module in group}


def slots_of(pages: int, host_pages: int = 100) -> DeviceSlots:
    cpu = torch.device("cpu")
    page = DeviceSlots(GROUPS, cpu, torch.float32, gib=0, host_gib=0).layout.elements * 4 / 2**30
    return DeviceSlots(GROUPS, cpu, torch.float32, gib=(pages + 0.5) * page, host_gib=(host_pages + 0.5) * page)


def adapter(slots: DeviceSlots, ranks: dict[str, int], seed: int = 0, gain: bool = False) -> tuple[LoraWeights, dict[str, Site]]:
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for path, rank in ranks.items():
        outputs, inputs = SHAPES[path]
        down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
        sites[path] = Site(down, up, torch.rand(outputs, generator=generator) if gain else None)
    staged = slots.staged(ranks, sites.items(), sites.items)
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
    assert torch.equal(alone.memory, made[1][0].staged.content.pages)


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
    assert slots.staged({"first": 33}, [], list) is None
    assert slots.staged({"first": 32}, [], list) is not None


def until_here(slots: DeviceSlots, weights: LoraWeights) -> None:
    deadline = time.monotonic() + 30
    while slots.ask(weights) == "coming":
        assert time.monotonic() < deadline, "it was not read in time"
        time.sleep(0.002)
    assert slots.ask(weights) == "here"


def test_who_leaves_host_memory_is_read_again_beside_the_steps() -> None:
    slots = slots_of(1, host_pages=2)
    one, two, three = (adapter(slots, {"first": rank}, rank) for rank in (1, 2, 3))
    assert [made.staged.content is not None for made, _ in (one, two, three)] == [False, True, True]
    assert slots.ask(two[0]) == "here", "its copy was used just now: three is the longest unused"
    may_read = threading.Event()
    given = one[0].staged.read

    def slowly() -> object:
        assert may_read.wait(30)
        return given()

    one[0].staged.read = slowly
    assert [slots.ask(one[0]) for _ in range(3)] == ["coming"] * 3
    slots.prefetch(one[0])
    assert slots.ask(two[0]) == "here", "others go on meanwhile"
    may_read.set()
    until_here(slots, one[0])
    expected = one[1]["first"].up @ one[1]["first"].down
    torch.testing.assert_close(product(slots, slots.number(one[0]), "first"), expected)
    counts = [(made.staged.host_loads, made.staged.host_evictions) for made, _ in (one, two, three)]
    assert counts == [(2, 1), (1, 0), (1, 1)]
    torch.testing.assert_close(slots.alone(three[0]).memory[0], slots.host.wait(three[0].staged).pages[0])


def test_one_that_is_forgotten_while_it_is_read_leaves_nothing() -> None:
    slots = slots_of(1, host_pages=1)
    one, two = (adapter(slots, {"first": rank}, rank)[0] for rank in (1, 2))
    begun, may_read, given = threading.Event(), threading.Event(), one.staged.read

    def slowly() -> object:
        begun.set()
        assert may_read.wait(30)
        return given()

    one.staged.read = slowly
    assert slots.ask(one) == "coming"
    assert begun.wait(30)
    reading = one.staged.reading
    slots.forget(one)
    may_read.set()
    reading.result(timeout=30)
    assert one.staged.content is None
    assert two.staged.content is not None, "nobody had to leave for it"


def test_what_is_read_again_is_what_was_checked(tiny_model: Path, load_tiny: Callable[..., LoadedBase], tmp_path: Path) -> None:
    model = load_tiny().model
    head = model.get_output_embeddings()
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    groups = [[(path, module)] for path, module in linear if module is not head]
    slots = DeviceSlots(groups, torch.device("cpu"), torch.float32, gib=0, host_gib=0)
    sites, made = LoraSites(model, slots), []
    for seed in range(2):
        with closed_folder(tmp_path / f"a{seed}", ADAPTER_KIND, {}) as draft:
            add_lora(tiny_model, draft, seed)
        made.append(sites.read(tmp_path / f"a{seed}", folder_digest(tmp_path / f"a{seed}")))
    one, two = made
    assert one is not None
    assert two is not None
    until_here(slots, two)
    first = two.staged.content.pages.clone()
    until_here(slots, one)
    assert two.staged.content is None
    until_here(slots, two)
    assert torch.equal(slots.pool.memory[0], first[0])

    weights = tmp_path / "a0" / ADAPTER_WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    until_here(slots, one)
    assert one.staged.is_lost
    slots.hold(one)
    for _ in range(2):
        with pytest.raises(ArtifactError, match="content differs"):
            slots.number(one)
    slots.hold(one)
    slots.let_go(one)
    assert one.staged.is_lost, "another request is still to be told"
    weights.write_bytes(whole)
    slots.let_go(one)
    until_here(slots, one)
    assert not one.staged.is_lost
    slots.number(one)
