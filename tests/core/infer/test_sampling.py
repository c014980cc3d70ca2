"""The sampler against the formulas written out plainly, and against itself in other company."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from core.infer.sampling import Drawing, Drawn, Sampling, choice_seed, draw
from core.infer.weights import ONE, largest_key, pick, weights_of

VOCABULARY = 700


def logits_of(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def row(seed: int = 0, prompt: tuple[int, ...] = (), generated: tuple[int, ...] = (), **options: Any) -> Drawing:
    banned = options.pop("banned", ())
    return Drawing(Sampling(**{"max_tokens": 100, "temperature": 1.0} | options), seed, prompt, generated, banned)


def plain_shares(logits: torch.Tensor, asked: Drawing) -> torch.Tensor:
    """The distribution [V] that a row asks for, by sorting and one id at a time."""
    s = asked.sampling
    scores = logits.double().tolist()
    for token in {*asked.prompt_ids, *asked.generated_ids}:
        scores[token] = scores[token] / s.repetition_penalty if scores[token] > 0 else scores[token] * s.repetition_penalty
    for token, count in Counter(asked.generated_ids).items():
        scores[token] -= s.presence_penalty + s.frequency_penalty * count
    for token, bias in s.logit_bias:
        scores[token] += bias
    for token in asked.banned:
        scores[token] = -math.inf
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    if s.temperature == 0:
        return torch.nn.functional.one_hot(torch.tensor(order[0]), len(scores)).double()
    shares = torch.softmax(torch.tensor(scores, dtype=torch.float64) / s.temperature, -1).tolist()
    kept = [token for token in order if shares[token] >= s.min_p * shares[order[0]]]
    kept = kept[: s.top_k] if s.top_k else kept
    total, mass, nucleus = sum(shares[token] for token in kept), 0.0, []
    for token in kept:
        if nucleus and mass >= s.top_p * total:
            break
        nucleus.append(token)
        mass += shares[token]
    out = torch.zeros(len(scores), dtype=torch.float64)
    for token in nucleus:
        out[token] = shares[token] / mass
    return out


PLANS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k over the vocabulary": {"top_k": VOCABULARY + 1},
    "top_p": {"top_p": 0.6},
    "a tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "all filters": {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    "repetition": {"repetition_penalty": 1.8, "prompt": (3, 5, 5, 9), "generated": (9, 11)},
    "repetition rewarded": {"repetition_penalty": 0.5, "prompt": (3, 5), "generated": (11,)},
    "presence": {"presence_penalty": 1.5, "prompt": (3,), "generated": (5, 5, 9)},
    "frequency": {"frequency_penalty": 0.8, "prompt": (3,), "generated": (5, 5, 9)},
    "frequency rewarded": {"frequency_penalty": -2.0, "generated": (5, 5, 9)},
    "bias": {"logit_bias": ((4, 9.0), (6, -100.0))},
    "banned": {"banned": (1, 2)},
    "all edits": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": ((5, 2.5), (8, -1.0)),
        "banned": (9, 11),
        "prompt": (3, 5, 5, 9),
        "generated": (5, 9, 9, 30),
        "top_p": 0.9,
    },
    "all banned but one": {"banned": tuple(token for token in range(VOCABULARY) if token != 17)},
}


@pytest.mark.parametrize("name", PLANS)
def test_each_setting_draws_from_the_distribution_its_formula_gives(name: str) -> None:
    (logits,) = logits_of(1)
    # The same penalised position 3,000 times; the seeds are what differs.
    rows = [row(seed, **PLANS[name]) for seed in range(3000)]
    expected = plain_shares(logits, rows[0]) * len(rows)
    drawn = Counter(one.token for one in draw(logits.expand(len(rows), -1), rows))
    assert all(expected[token] > 0 for token in drawn)
    often = [token for token in range(VOCABULARY) if expected[token] >= 10]
    rare = len(rows) - float(expected[often].sum())
    observed, wanted = [drawn[token] for token in often], expected[often].tolist()
    if rare > 1e-6:
        observed, wanted = [*observed, len(rows) - sum(observed)], [*wanted, rare]
    assert sum(observed) == len(rows)
    if len(wanted) > 1:
        assert chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all filters", "all edits"])
def test_filters_keep_exactly_the_candidates_of_the_formula(name: str) -> None:
    # 40 candidates among 700, so that 4,000 draws meet every one that is left.
    logits = torch.full((1, VOCABULARY), -40.0)
    logits[0, :40] = torch.linspace(2, 0, 40)
    rows = [row(seed, **PLANS[name]) for seed in range(4000)]
    drawn = {one.token for one in draw(logits.expand(len(rows), -1), rows)}
    assert drawn == set(torch.nonzero(plain_shares(logits[0], rows[0]) > 1e-12)[:, 0].tolist())


def test_what_a_row_gets_is_the_same_bit_for_bit_in_any_company() -> None:
    plans = [
        row(seed, generated=(1,) * seed, **options) for seed, options in enumerate(PLANS.values()) if "generated" not in options
    ]
    plans += [row(seed, **options) for seed, options in enumerate(PLANS.values()) if "generated" in options]
    plans.append(row(99, top_logprobs=5))
    for vocabulary in (VOCABULARY, 49_157):
        logits = logits_of(len(plans), vocabulary, seed=4)
        alone = [draw(logits[at : at + 1], plans[at : at + 1])[0] for at in range(len(plans))]
        assert draw(logits, plans) == alone
        order = torch.randperm(len(plans), generator=torch.Generator().manual_seed(1)).tolist()
        assert draw(logits[order], [plans[at] for at in order]) == [alone[at] for at in order]
        for size in (2, 3, 5):
            for begin in range(0, len(plans) - size, size):
                some = slice(begin, begin + size)
                assert draw(logits[some], plans[some]) == alone[some]


def test_neither_threads_nor_the_layout_of_the_logits_change_a_token() -> None:
    plans = [row(seed, top_p=0.9) for seed in range(6)]
    logits = logits_of(6, 49_157)
    expected = draw(logits, plans)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert draw(logits, plans) == expected
    finally:
        torch.set_num_threads(threads)
    wide = torch.empty(49_157, 6).copy_(logits.T).T
    assert not wide.is_contiguous()
    assert draw(wide, plans) == expected


def test_chance_comes_from_seed_and_position_alone() -> None:
    logits = logits_of(1)

    def tokens(seed: int) -> list[int]:
        return [draw(logits, [row(seed, generated=(0,) * at)])[0].token for at in range(30)]

    assert tokens(5) == tokens(5)
    assert tokens(5) == tokens(5 - 2**64) != tokens(6)
    assert len(set(tokens(5))) > 5
    assert len({choice_seed(5, choice) for choice in range(100)}) == 100
    assert choice_seed(5, 0) == 5
    assert len({Sampling(max_tokens=1).resolved_seed() for _ in range(20)}) == 20


def test_the_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = logits_of(3)
    asked = [
        row(1, temperature=0.1, top_p=0.2, top_logprobs=4),
        row(2, temperature=0, logit_bias=((4, 100.0),), top_logprobs=2),
        row(3, presence_penalty=2, generated=(5,)),
    ]
    table = torch.log_softmax(logits.double(), -1)
    for number, (drawn, one) in enumerate(zip(draw(logits, asked), asked, strict=True)):
        assert drawn.logprob == pytest.approx(float(table[number, drawn.token]), abs=1e-6)
        values, ids = table[number].topk(max(1, one.sampling.top_logprobs))
        assert [token for token, _ in drawn.top] == ids.tolist()[: one.sampling.top_logprobs]
        assert [value for _, value in drawn.top] == pytest.approx(values.tolist()[: one.sampling.top_logprobs], abs=1e-6)
    assert draw(logits, asked)[1].token == 4


def test_a_temperature_near_zero_is_greedy_and_no_nan() -> None:
    logits = logits_of(4)
    for temperature in (1e-5, 1e-40, 1e-300):
        drawn = draw(logits, [row(seed, temperature=temperature) for seed in range(4)])
        assert [one.token for one in drawn] == logits.argmax(-1).tolist()
        assert all(one.is_finite for one in drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_logits_are_left_as_they_were(dtype: torch.dtype) -> None:
    logits = logits_of(2).to(dtype)
    before = logits.clone()
    draw(logits, [row(logit_bias=((1, 5.0),), top_k=3), row(repetition_penalty=2.0, prompt=(1, 2), top_p=0.5, min_p=0.1)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.5, "top_k": 4, "min_p": 0.1}])
def test_a_row_whose_logits_are_no_numbers_fails_alone(options: dict[str, Any]) -> None:
    logits = logits_of(5)
    rows = [row(seed, top_logprobs=2, **options) for seed in range(5)]
    good = draw(logits, rows)
    assert all(one.is_finite for one in good)
    logits[1, 3] = float("nan")
    logits[2, 6] = float("inf")
    logits[3] = float("-inf")
    drawn = draw(logits, rows)
    assert [one.is_finite for one in drawn] == [True, False, False, False, True]
    assert (drawn[0], drawn[4]) == (good[0], good[4])
    assert all(0 <= one.token < VOCABULARY for one in drawn)


def test_a_row_of_which_nothing_is_left_fails_alone() -> None:
    logits = logits_of(2)
    first, second = draw(logits, [row(banned=tuple(range(VOCABULARY))), row()])
    assert (first.is_finite, second.is_finite) == (False, True)


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = logits_of(1)
    logits[0, 1:] = float("-inf")
    drawn: list[Drawn] = draw(logits.expand(50, -1), [row(seed, temperature=2.0) for seed in range(50)])
    assert {(one.token, one.is_finite) for one in drawn} == {(0, True)}


def test_candidates_of_equal_probability_stay_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        drawn = draw(logits.expand(300, -1), [row(seed, **options) for seed in range(300)])
        assert {one.token for one in drawn} == {0, 1, 2}


def test_min_tokens_bans_what_would_end_the_answer() -> None:
    sampling = Sampling(max_tokens=9, min_tokens=2, stop_token_ids=(7,))
    assert Drawing.at(sampling, 0, (), (4,), (1, 2)).banned == (1, 2, 7)
    assert Drawing.at(sampling, 0, (), (4, 4), (1, 2)).banned == ()
    assert Sampling(max_tokens=9, ignore_eos=True, stop_token_ids=(7,)).ending_ids((1, 2)) == (7,)


def test_thresholds_equal_those_of_a_sort() -> None:
    keys, weights = weights_of(logits_of(6) - 12)
    for wanted in (1, ONE // 1000, ONE // 3, 2**62):
        found = largest_key(keys, weights, torch.full((6,), wanted))
        for number in range(6):
            ordered, order = keys[number].sort(descending=True)
            reached = weights[number][order].cumsum(0) >= wanted
            expected = int(ordered[int(reached.int().argmax())]) if bool(reached.any()) else 0
            assert int(found[number]) == expected


def test_a_draw_falls_on_a_token_with_weight_at_either_end_of_the_range() -> None:
    weights = torch.zeros(2, 1500, dtype=torch.int64)
    weights[:, 600], weights[:, 1499] = 1, ONE
    assert pick(weights, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [600, 1499]
