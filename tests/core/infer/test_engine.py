"""The engine: whatever runs beside it, an answer is the reference's; what fails or leaves takes nobody along."""

import json
import queue
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InvalidInput, NotFound, Unavailable
from core.infer import lane
from core.infer.adapters import AdaptedBase
from core.infer.engine import Engine, QueueFull
from core.infer.generate import generate
from core.infer.progress import End, Token
from core.infer.runner import PAGE
from core.infer.sampling import Draws, Sampling
from core.infer.schedule import Scheduler
from core.infer.servable import Servable
from core.infer.ticket import Failed, Item
from core.models.load import LoadedBase
from tests.tiny import build_tiny_model

LONG = Sampling(max_tokens=200, ignore_eos=True)


@dataclass
class Asked:
    """A request as its reader sees it."""

    items: list[Item] = field(default_factory=list)
    told: "queue.Queue[Item]" = field(default_factory=queue.Queue)

    def __call__(self, item: Item) -> None:
        self.items.append(item)
        self.told.put(item)

    def wait(self, tokens: int | None = None) -> Item:
        """The End or Failed; or, once there are so many tokens, the item that was read last."""
        while True:
            item = self.told.get(timeout=30)
            if not isinstance(item, Token) or (tokens is not None and len(self.ids) >= tokens):
                return item

    @property
    def ids(self) -> list[int]:
        return [item.id for item in self.items if isinstance(item, Token)]


class Bench:
    """A base with two packed adapters, and the same under peft as the reference."""

    def __init__(self, host: AdaptedBase, reference: AdaptedBase, model: Path, folders: list[Path]) -> None:
        self.host = host
        self._reference = reference
        assert host.runner is not None
        self.pages = host.runner.pages
        self.servables = [Servable(host, model)]
        for number, folder in enumerate(folders):
            weights = host.runner.sites.read(folder, f"digest {number}")
            assert weights is not None
            host.runner.sites.install(weights)
            self.servables.append(Servable(host, folder, weights=weights))
            reference.load(folder, f"adapter{number}")

    def expected(self, which: int, prompt_ids: list[int], sampling: Sampling) -> list[Token | End]:
        self._reference.activate(f"adapter{which - 1}" if which else None)
        servable = self.servables[which]
        return list(generate(self._reference.model, prompt_ids, sampling, servable.tokenizer, servable.stop_ids))


@pytest.fixture(params=[False, True], ids=["", "a step ahead"])
def is_ahead(request: pytest.FixtureRequest) -> bool:
    """Whether the lane runs a step ahead of what it has read, as on a GPU."""
    return bool(request.param)


@pytest.fixture
def bench(tiny_model: Path, load_tiny: Callable[..., LoadedBase], lora_folder: Callable[[int], Path], is_ahead: bool) -> Bench:
    host = AdaptedBase(load_tiny())
    assert host.runner is not None
    host.runner._compute.is_asynchronous = is_ahead
    return Bench(host, AdaptedBase(load_tiny()), tiny_model, [lora_folder(1), lora_folder(2)])


@pytest.fixture
def small(tiny_model: Path, load_tiny: Callable[..., LoadedBase], lora_folder: Callable[[int], Path], is_ahead: bool) -> Bench:
    """Room for 512 tokens: one request of the whole context."""
    kv_gib = 512 * 2 * 2 * 2 * 16 * 4 / 2**30  # layers, keys and values, heads, width, fp32
    host = AdaptedBase(load_tiny(), kv_gib=kv_gib)
    assert host.runner is not None
    host.runner._compute.is_asynchronous = is_ahead
    bench = Bench(host, AdaptedBase(load_tiny()), tiny_model, [lora_folder(1), lora_folder(2)])
    assert bench.pages.count * PAGE == 512
    return bench


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(Engine(**options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(3, 500), k=tokens)


@pytest.mark.parametrize("step_tokens", [16, 512])
def test_mixed_requests_get_what_the_reference_gives_each(step_tokens: int, bench: Bench, start: Callable[..., Engine]) -> None:
    """Thirty at once, greedy and drawn, prompts of 1 to 90 tokens, read whole or in pieces of 16."""
    engine = start(step_tokens=step_tokens)
    requests = []
    for number in range(30):
        sampling = Sampling(
            max_tokens=1 + number % 20,
            temperature=0.9 * (number % 2),
            top_p=0.9,
            repetition_penalty=1.0 + 0.2 * (number % 3),
            seed=number,
            top_logprobs=2,
            ignore_eos=number % 5 > 0,
        )
        requests.append((number % 3, prompt(number, random.Random(number).randint(1, 90)), sampling, Asked()))
    for which, ids, sampling, asked in requests:
        engine.submit(bench.servables[which], ids, sampling, asked)
    for which, ids, sampling, asked in requests:
        asked.wait()
        expected = bench.expected(which, ids, sampling)
        assert len(asked.items) == len(expected)
        for here, there in zip(asked.items, expected, strict=True):
            if isinstance(there, End):
                assert here == there
            else:
                assert isinstance(here, Token)
                assert (here.id, here.text) == (there.id, there.text)
                assert here.logprob == pytest.approx(there.logprob, abs=1e-4)
                assert [token for token, _ in here.top] == [token for token, _ in there.top]
    assert engine.load == 0
    assert bench.pages.available == bench.pages.count


def test_what_two_prompts_share_is_computed_once_and_never_across_adapters_or_tenants(
    bench: Bench, start: Callable[..., Engine]
) -> None:
    engine = start()
    beginning, sampling = prompt(0, 5 * PAGE), Sampling(max_tokens=8, ignore_eos=True)

    def cached(which: int, tenant: str, tail: list[int]) -> int:
        asked, ids = Asked(), [*beginning, *tail]
        ticket = engine.submit(bench.servables[which], ids, sampling, asked, tenant=tenant)
        asked.wait()
        expected = bench.expected(which, ids, sampling)
        assert asked.ids == [item.id for item in expected if isinstance(item, Token)]
        return ticket.cached_tokens

    assert cached(1, "one", [5]) == 0
    assert cached(1, "one", [6, 7]) == 5 * PAGE
    assert cached(2, "one", [6]) == 0, "another adapter"
    assert cached(0, "one", [6]) == 0, "no adapter"
    assert cached(1, "two", [6]) == 0, "another tenant"
    assert cached(1, "one", []) == 4 * PAGE, "the last token is always computed"


def test_answers_step_back_and_are_taken_up_where_memory_is_short(small: Bench, start: Callable[..., Engine]) -> None:
    engine = start()
    requests = [(number % 3, prompt(number, 60), Sampling(max_tokens=150, ignore_eos=True), Asked()) for number in range(6)]
    tickets = [engine.submit(small.servables[which], ids, sampling, asked) for which, ids, sampling, asked in requests]
    for which, ids, sampling, asked in requests:
        assert isinstance(asked.wait(), End)
        assert asked.ids == [item.id for item in small.expected(which, ids, sampling) if isinstance(item, Token)]
    assert small.pages.available == small.pages.count
    assert [ticket.cached_tokens for ticket in tickets] == [0] * 6, "pages found again are their own"


def test_answers_end_where_the_reference_ends_them_while_memory_is_short(small: Bench, start: Callable[..., Engine]) -> None:
    """A step ahead, stop strings and ids are found when the next step runs already, and answers step back meanwhile."""
    requests = []
    for number in range(9):
        ids, plain = prompt(number, 60), Sampling(max_tokens=150, ignore_eos=True)
        text = "".join(item.text for item in small.expected(number % 3, ids, plain))
        stop = (text[40 + number : 43 + number],) if number % 2 else ()
        requests.append((number % 3, ids, Sampling(max_tokens=150, ignore_eos=number > 4, stop=stop), Asked()))
    engine = start()
    for which, ids, sampling, asked in requests:
        engine.submit(small.servables[which], ids, sampling, asked)
    ends = set()
    for which, ids, sampling, asked in requests:
        asked.wait()
        expected = small.expected(which, ids, sampling)
        assert [type(item) for item in asked.items] == [type(item) for item in expected]
        assert [item.text for item in asked.items] == [item.text for item in expected]  # type: ignore[union-attr]
        ends.add(expected[-1].reason)  # type: ignore[union-attr]
    assert ends == {"stop", "length"}
    engine.call(lambda: None)
    assert small.pages.available == small.pages.count
    assert engine.load == 0


@pytest.mark.parametrize("asks_back", [False, True])
def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(
    asks_back: bool, is_ahead: bool, bench: Bench, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host need not know them: a penalty asks which tokens came."""
    runner, order = bench.host.runner, []
    assert runner is not None
    step, read = runner.step, Draws.read
    monkeypatch.setattr(runner, "step", lambda shares: (order.append("step"), step(shares))[1])
    monkeypatch.setattr(Draws, "read", lambda draws: (order.append("read"), read(draws))[1])
    penalty = 1.5 if asks_back else 1.0
    sampling = Sampling(max_tokens=6, ignore_eos=True, temperature=0.7, seed=3, repetition_penalty=penalty, min_tokens=3)
    asked, engine = Asked(), start()
    engine.submit(bench.servables[1], prompt(0, 20), sampling, asked)
    asked.wait()
    is_unread = is_ahead and not asks_back
    assert order == (["step", *["step", "read"] * 5, "read"] if is_unread else ["step", "read"] * 6)
    monkeypatch.undo()
    assert asked.ids == [item.id for item in bench.expected(1, prompt(0, 20), sampling) if isinstance(item, Token)]


def test_an_adapter_on_its_way_holds_up_nobody_else(
    bench: Bench, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the first adapter arrives after a while, and for the second there is room when the first's answer is done."""
    runner = bench.host.runner
    assert runner is not None
    first, second = (bench.servables[number].weights for number in (1, 2))
    order: list[int] = []
    questions: list[object] = []

    def residence(weights: object) -> str:
        questions.append(weights)
        if weights is first:
            return "here" if questions.count(first) > 40 else "coming"
        return "no-room" if weights is second and 1 not in order else "here"

    monkeypatch.setattr(runner, "residence", residence)
    engine, sampling = start(), Sampling(max_tokens=8, ignore_eos=True)
    requests = [(which, prompt(number, 20), Asked()) for number, which in enumerate((1, 0, 0, 2, 0))]

    def submit(which: int, ids: list[int], asked: Asked) -> None:
        def deliver(item: Item) -> None:
            if isinstance(item, End):
                order.append(which)
            asked(item)

        engine.submit(bench.servables[which], ids, sampling, deliver)

    engine.call(lambda: [submit(*request) for request in requests])
    for which, ids, asked in requests:
        assert isinstance(asked.wait(), End)
        assert asked.ids == [item.id for item in bench.expected(which, ids, sampling) if isinstance(item, Token)]
    assert order[:2] == [0, 1], "what the queue has behind the second adapter waits with it"
    assert bench.pages.available == bench.pages.count


def test_who_leaves_is_forgotten_and_the_others_go_on(bench: Bench, start: Callable[..., Engine]) -> None:
    engine = start()
    stays, leaves = Asked(), Asked()
    ids = prompt(1, 20)
    engine.submit(bench.servables[1], ids, Sampling(max_tokens=60, ignore_eos=True), stays)
    ticket = engine.submit(bench.servables[2], ids, LONG, leaves)
    leaves.wait(tokens=3)
    ticket.cancel()
    told = len(leaves.items)
    assert isinstance(stays.wait(), End)
    assert len(leaves.items) <= told + 1, "the token under way"
    engine.call(lambda: None)
    engine.call(lambda: None)
    assert engine.load == 0
    assert bench.pages.available == bench.pages.count


def test_a_request_that_breaks_a_step_fails_alone(
    bench: Bench, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is injected where the model runs: whenever the poisoned token takes part."""
    engine = start()
    runner = bench.host.runner
    assert runner is not None
    usual = runner._compute.forward

    def faulty(shares: Any, wanted: Any) -> torch.Tensor:
        if any(501 in context.ids for context, _ in shares):
            raise RuntimeError("injected")
        return usual(shares, wanted)

    monkeypatch.setattr(runner._compute, "forward", faulty)
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    requests = [(number % 3, [*prompt(number, 20), 501 if number == 2 else 5], Asked()) for number in range(5)]
    engine.call(lambda: [engine.submit(bench.servables[which], ids, sampling, asked) for which, ids, asked in requests])
    for number, (which, ids, asked) in enumerate(requests):
        last = asked.wait()
        if number == 2:
            assert last == Failed("the engine failed on this request")
        else:
            assert isinstance(last, End)
            assert asked.ids == [item.id for item in bench.expected(which, ids, sampling) if isinstance(item, Token)]
    assert engine.is_alive
    assert bench.pages.available == bench.pages.count


def test_logits_that_are_no_numbers_fail_their_request_alone(
    bench: Bench, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    usual = lane.launch

    def spoilt(logits: torch.Tensor, rows: Any, into: torch.Tensor | None = None) -> Any:
        logits = logits.clone()
        for number, row in enumerate(rows):
            if len(row.prompt_ids) == 7:
                logits[number] = float("nan")
        return usual(logits, rows, into)

    monkeypatch.setattr(lane, "launch", spoilt)
    bad, good, sampling = Asked(), Asked(), Sampling(max_tokens=12, ignore_eos=True)
    engine.call(
        lambda: [
            engine.submit(bench.servables[1], prompt(0, 7), sampling, bad),
            engine.submit(bench.servables[1], prompt(0, 8), sampling, good),
        ]
    )
    assert bad.wait() == Failed("the model's logits are not finite numbers")
    assert isinstance(good.wait(), End)
    assert good.ids == [item.id for item in bench.expected(1, prompt(0, 8), sampling) if isinstance(item, Token)]


def test_a_setting_that_can_not_be_drawn_with_fails_its_request_alone(bench: Bench, start: Callable[..., Engine]) -> None:
    """The endpoint refuses an id outside the vocabulary; who comes by another door must not end the loop."""
    engine = start()
    bad, good, sampling = Asked(), Asked(), Sampling(max_tokens=12, ignore_eos=True)
    outside = Sampling(max_tokens=12, logit_bias=((100_000, 1.0),))
    engine.call(
        lambda: [
            engine.submit(bench.servables[1], prompt(0, 9), outside, bad),
            engine.submit(bench.servables[2], prompt(0, 8), sampling, good),
        ]
    )
    assert bad.wait() == Failed("the engine failed on this request")
    assert isinstance(good.wait(), End)
    assert good.ids == [item.id for item in bench.expected(2, prompt(0, 8), sampling) if isinstance(item, Token)]
    assert bench.pages.available == bench.pages.count


@pytest.mark.parametrize("place", ["drawing", "text"])
def test_a_fault_behind_the_step_fails_its_request_alone(
    place: str, bench: Bench, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    usual = lane.launch

    def faulty(logits: torch.Tensor, rows: Any, into: torch.Tensor | None = None) -> Any:
        if any(len(row.prompt_ids) == 7 for row in rows):
            raise RuntimeError("injected")
        return usual(logits, rows, into)

    bad, good, sampling = Asked(), Asked(), Sampling(max_tokens=12, ignore_eos=True)

    def submit() -> None:
        ticket = engine.submit(bench.servables[1], prompt(0, 7), sampling, bad)
        engine.submit(bench.servables[1], prompt(0, 8), sampling, good)
        if place == "text":
            monkeypatch.delattr(ticket.progress, "_answer")

    if place == "drawing":
        monkeypatch.setattr(lane, "launch", faulty)
    engine.call(submit)
    assert bad.wait() == Failed("the engine failed on this request")
    assert isinstance(good.wait(), End)
    assert good.ids == [item.id for item in bench.expected(1, prompt(0, 8), sampling) if isinstance(item, Token)]
    assert engine.is_alive
    assert bench.pages.available == bench.pages.count


def test_who_leaves_while_the_engine_sweeps_gives_its_pages_back(
    bench: Bench, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = start(), Asked()
    ticket = engine.submit(bench.servables[1], prompt(1, 40), LONG, asked)
    asked.wait(tokens=3)
    usual = Scheduler.drop_cancelled
    monkeypatch.setattr(Scheduler, "drop_cancelled", lambda schedule: (usual(schedule), ticket.cancel()))
    while engine.load:
        engine.call(lambda: None)
    engine.call(lambda: None)
    engine.call(lambda: None)
    assert bench.pages.available == bench.pages.count


def test_a_seed_says_the_text_at_any_load(bench: Bench, start: Callable[..., Engine]) -> None:
    engine = start()
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=7, ignore_eos=True)
    alone = Asked()
    engine.submit(bench.servables[1], prompt(3, 30), sampling, alone)
    alone.wait()
    crowd = [Asked() for _ in range(12)]
    for number, asked in enumerate(crowd):
        ids = prompt(3, 30) if number == 6 else prompt(number, 10 + number)
        engine.submit(bench.servables[number % 3 if number != 6 else 1], ids, sampling, asked, tenant=str(number))
    for asked in crowd:
        asked.wait()
    assert crowd[6].ids == alone.ids


def test_peft_answers_what_packed_steps_cant_beside_them(
    bench: Bench, lora_folder: Callable[[int], Path], start: Callable[..., Engine]
) -> None:
    engine = start()
    engine.call(lambda: bench.host.load(lora_folder(2), "by_peft"))
    slow = Servable(bench.host, lora_folder(2), adapter="by_peft")
    assert slow.packed_tokens == 0
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    requests = [(1, bench.servables[1], Asked()), (2, slow, Asked()), (0, bench.servables[0], Asked()), (2, slow, Asked())]
    for _, servable, asked in requests:
        engine.submit(servable, prompt(5, 25), sampling, asked)
    for which, _, asked in requests:
        assert isinstance(asked.wait(), End)
        assert asked.ids == [item.id for item in bench.expected(which, prompt(5, 25), sampling) if isinstance(item, Token)]


def test_a_request_beyond_a_models_window_is_answered_alone(
    tmp_path: Path, load_tiny: Callable[..., LoadedBase], start: Callable[..., Engine]
) -> None:
    """Mistral's attention sees its window: packed steps are right up to there, and the reference beyond."""
    folder = build_tiny_model(tmp_path / "mistral", family="mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 48}))
    host, reference = AdaptedBase(load_tiny(folder=folder)), load_tiny(folder=folder)
    servable = Servable(host, folder)
    assert (servable.packed_tokens, servable.context_length) == (48, 512)
    engine = start()
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    requests = [(prompt(tokens, tokens), Asked()) for tokens in (10, 28, 29, 80)]
    tickets = [engine.submit(servable, ids, sampling, asked) for ids, asked in requests]
    assert [ticket.is_packed for ticket in tickets] == [True, True, False, False]
    for ids, asked in requests:
        assert isinstance(asked.wait(), End)
        expected = generate(reference.model, ids, sampling, servable.tokenizer, servable.stop_ids)
        assert asked.ids == [item.id for item in expected if isinstance(item, Token)]


def test_a_retired_version_ends_its_answers_and_takes_no_more(bench: Bench, start: Callable[..., Engine]) -> None:
    engine = start()
    asked, gone = Asked(), Asked()
    finished: queue.Queue[int] = queue.Queue()
    engine.submit(bench.servables[1], prompt(0, 10), Sampling(max_tokens=80, ignore_eos=True), asked)
    asked.wait(tokens=2)
    engine.retire(bench.servables[1], lambda: finished.put(len(asked.ids)))
    with pytest.raises(NotFound):
        engine.submit(bench.servables[1], prompt(0, 10), LONG, gone)
    assert isinstance(asked.wait(), End)
    assert finished.get(timeout=30) == 80, "after the last token"


def test_bounds_are_kept_before_anything_is_queued(small: Bench, start: Callable[..., Engine]) -> None:
    engine = start(max_waiting=2, running=1)
    with pytest.raises(InvalidInput, match="the context of 512"):
        engine.submit(small.servables[0], prompt(0, 500), Sampling(max_tokens=13), Asked())
    running = Asked()
    tickets = [engine.submit(small.servables[0], prompt(0, 10), LONG, running)]
    running.wait(tokens=1)
    tickets += [engine.submit(small.servables[0], prompt(0, 10), LONG, Asked()) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit(small.servables[0], prompt(0, 10), LONG, Asked())
    tickets[1].cancel()
    engine.submit(small.servables[0], prompt(0, 10), LONG, Asked())


def test_closing_fails_what_is_open_and_refuses_what_comes(bench: Bench) -> None:
    engine = Engine()
    asked = Asked()
    engine.submit(bench.servables[0], prompt(0, 10), LONG, asked)
    asked.wait(tokens=2)
    engine.close()
    assert asked.items[-1] == Failed("the endpoint is stopping")
    with pytest.raises(Unavailable):
        engine.submit(bench.servables[0], prompt(0, 10), LONG, Asked())
    with pytest.raises(Unavailable):
        engine.call(lambda: None)
