"""The loss is the mean over trained tokens of the whole step, however the step is cut, and over nothing else."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from core.eval import nats
from core.eval.evaluate import evaluate
from core.eval.layout import Layout, Packed, Padded
from core.eval.nats import trained_nats
from core.eval.rows import Example, Row, collate_packed, collate_padded
from core.models.documents import DOCUMENTS
from core.spec import DpoObjective, OrpoObjective, SftObjective
from core.train.losses import LOSSES, _log1mexp, token_loss
from tests.core.train.runs import random_rows
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")


def as_examples(pairs: list[tuple[list[int], list[int]]]) -> list[Example]:
    return [Example(((np.array(ids, np.int32), np.array(mask, np.uint8)),)) for ids, mask in pairs]


EXAMPLES = as_examples(random_rows(8, seed=3))
COLLATE = {"padded": collate_padded, "packed": collate_packed}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_tiny_model(tmp_path_factory.mktemp("m") / "model", family=request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(params=COLLATE)
def collate(request: pytest.FixtureRequest) -> Any:
    return COLLATE[request.param]


@pytest.fixture
def model(loaded: Any, collate: Any) -> Any:
    """With the attention that the layout needs."""
    loaded.set_attn_implementation(DOCUMENTS if collate is collate_packed else "sdpa")
    yield loaded
    loaded.set_attn_implementation("sdpa")


@torch.no_grad()
def reference_nats(model: Any, row: Row) -> list[float]:
    """Written from the definition: one unpadded row, full logits, one token at a time, in float64."""
    ids, mask = row
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.tensor([ids.tolist()])).logits[0].double()
    model.set_attn_implementation(before)
    return [float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, int(ids[t])]) for t in range(1, len(ids)) if mask[t] == 1]


def test_a_batch_has_the_loss_of_its_rows_alone(model: Any, collate: Any) -> None:
    batch = collate(EXAMPLES, CPU)
    assert len({example.longest for example in EXAMPLES}) > 3, "the batch has to be padded"
    values, sequence = trained_nats(model, batch)
    found = token_loss(model, batch, SftObjective())
    for number, example in enumerate(EXAMPLES):
        expected = reference_nats(model, example.sequences[0])
        assert values[sequence == number].tolist() == pytest.approx(expected, abs=1e-4)
        assert found.sums[number].item() == pytest.approx(sum(expected), rel=1e-5)
        assert found.terms[number].item() == len(expected) == example.trained_tokens


def test_evaluation_reports_rows_in_their_order_and_keeps_the_mode(model: Any, collate: Any) -> None:
    model.train()
    layout = Packed(60) if collate is collate_packed else Padded(3)
    found = evaluate(
        model, EXAMPLES, loss=partial(token_loss, objective=SftObjective()), layout=layout, device=CPU, compute=torch.no_grad
    )
    assert model.training
    for (total, count), example in zip(found.losses, EXAMPLES, strict=True):
        expected = reference_nats(model, example.sequences[0])
        assert count == len(expected)
        assert total == pytest.approx(sum(expected), rel=1e-5)


def test_trap_3_gradients_do_not_depend_on_how_a_step_is_cut_or_laid_out(loaded: Any) -> None:
    """1×8 = 2×4 = 4×2 = 8×1 = packed, a short last window included."""
    examples = EXAMPLES[:7]
    terms = sum(example.trained_tokens for example in examples)

    def gradients(layout: Layout) -> list[torch.Tensor]:
        loaded.zero_grad()
        loaded.set_attn_implementation(DOCUMENTS if isinstance(layout, Packed) else "sdpa")
        for part in layout.split(examples):
            (token_loss(loaded, layout.collate(part, CPU), SftObjective()).sums.sum() / terms).backward()
        loaded.set_attn_implementation("sdpa")
        return [p.grad.clone() for p in loaded.parameters()]

    whole = gradients(Padded(8))
    scale = max(float(g.abs().max()) for g in whole)
    for layout in (Padded(1), Padded(2), Padded(4), Packed(1000), Packed(40), Packed(1)):
        for one, other in zip(whole, gradients(layout), strict=True):
            assert float((one - other).abs().max()) < 1e-5 * scale, str(layout)


def test_trap_4_a_packed_row_does_not_see_its_neighbours(loaded: Any) -> None:
    """Change one document and the others' losses do not move by a bit."""
    loaded.set_attn_implementation(DOCUMENTS)
    whole = token_loss(loaded, collate_packed(EXAMPLES, CPU), SftObjective()).sums
    ids, mask = EXAMPLES[3].sequences[0]
    changed = [*EXAMPLES[:3], Example((((ids + 7) % 200, mask),)), *EXAMPLES[4:]]
    other = token_loss(loaded, collate_packed(changed, CPU), SftObjective()).sums
    loaded.set_attn_implementation("sdpa")
    assert other[3] != whole[3]
    assert torch.equal(other[[0, 1, 2, 4, 5, 6, 7]], whole[[0, 1, 2, 4, 5, 6, 7]])


def test_a_packed_batch_without_its_bounds_is_refused(loaded: Any) -> None:
    loaded.set_attn_implementation(DOCUMENTS)
    with pytest.raises(ValueError, match="bounds"):
        loaded(input_ids=torch.tensor([[5, 6, 7]]))
    loaded.set_attn_implementation("sdpa")


def test_bins_hold_every_example_once_and_no_more_than_they_may() -> None:
    for tokens in (1, 30, 45, 400):
        bins = Packed(tokens).split(EXAMPLES)
        assert sorted(id(example) for part in bins for example in part) == sorted(map(id, EXAMPLES))
        for part in bins:
            assert len(part) == 1 or sum(example.tokens for example in part) <= tokens
    assert [len(part) for part in Padded(3).split(EXAMPLES)] == [3, 3, 2]


def test_trap_12_chunked_logits_give_the_same_gradient(model: Any, collate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = token_loss(model, collate(EXAMPLES, CPU), SftObjective()).sums.sum()
        total.backward()
        return total.item(), model.get_input_embeddings().weight.grad.clone()

    whole = run()
    monkeypatch.setattr(nats, "LOGITS_PER_CHUNK", 5 * 512)
    chunked = run()
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
    assert torch.allclose(chunked[1], whole[1], atol=1e-5)


def test_trap_1_labels_are_the_renderers_prompt_and_padding_carry_none() -> None:
    end = 2
    examples = as_examples([([5, 6, 7, end], [0, 0, 1, 1]), ([5, 6, 7, 8, 9, end], [1, 0, 0, 1, 1, 1])])
    padded, packed = collate_padded(examples, CPU), collate_packed(examples, CPU)
    for batch in (padded, packed):
        assert batch.labels.tolist() == [7, end, 8, 9, end], "the first token of a row is never one"
        assert batch.sequence.tolist() == [0, 0, 1, 1, 1]
        assert batch.counts.tolist() == [2, 3]
    assert padded.place.tolist() == [1, 2, 6 + 2, 6 + 3, 6 + 4], "the place before a token's own"
    assert packed.place.tolist() == [1, 2, 4 + 2, 4 + 3, 4 + 4]
    assert packed.documents is not None
    assert packed.documents.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]
    assert packed.documents.bounds.tolist() == [0, 4, 10]
    for batch in (padded, packed):
        assert (batch.tokens, batch.trained_tokens) == (10, 5)


def test_trap_2_the_padding_id_may_be_a_trained_one() -> None:
    batch = collate_padded(as_examples([([5, 0], [0, 1]), ([5, 6, 0], [0, 1, 1])]), CPU)
    assert (batch.labels.tolist(), batch.place.tolist()) == ([0, 6, 0], [0, 3, 4])


def pairs_of(examples: list[Example], reference: float = -20.0) -> list[Example]:
    """Neighbours as (chosen, rejected), with made-up reference log-probabilities."""
    return [
        Example((a.sequences[0], b.sequences[0]), (reference, reference - 1.5))
        for a, b in zip(examples[::2], examples[1::2], strict=True)
    ]


@pytest.mark.parametrize(
    "objective",
    [
        DpoObjective(),
        DpoObjective(beta=0.3, label_smoothing=0.2),
        DpoObjective(loss="hinge", beta=0.5),
        DpoObjective(loss="ipo"),
        OrpoObjective(),
        OrpoObjective(beta=1.5),
    ],
    ids=lambda o: f"{o.kind}-{getattr(o, 'loss', '')}-{o.beta}",
)
def test_preference_losses_are_those_of_their_definitions(
    model: Any, collate: Any, objective: DpoObjective | OrpoObjective
) -> None:
    """In float64, from log-probabilities of one row at a time; the formulas as the papers write them."""
    pairs = pairs_of(EXAMPLES)
    found = LOSSES[objective.kind].function(model, collate(pairs, CPU), objective)
    for number, pair in enumerate(pairs):
        logps = [[-value for value in reference_nats(model, row)] for row in pair.sequences]
        chosen, rejected = (math.fsum(values) for values in logps)
        if isinstance(objective, OrpoObjective):
            p_chosen, p_rejected = (math.exp(math.fsum(values) / len(values)) for values in logps)
            odds = math.log(p_chosen / (1 - p_chosen)) - math.log(p_rejected / (1 - p_rejected))
            expected = -math.log(p_chosen) - objective.beta * math.log(1 / (1 + math.exp(-odds)))
            margin = odds
        else:
            gains = [chosen - pair.reference[0], rejected - pair.reference[1]]
            if objective.loss == "ipo":
                gains = [gain / len(values) for gain, values in zip(gains, logps, strict=True)]
            h = gains[0] - gains[1]
            margin = objective.beta * h
            if objective.loss == "sigmoid":
                sigma = 1 / (1 + math.exp(-margin))
                eps = objective.label_smoothing
                expected = -(1 - eps) * math.log(sigma) - eps * math.log(1 - sigma)
            elif objective.loss == "hinge":
                expected = max(0.0, 1 - margin)
            else:
                expected = (h - 1 / (2 * objective.beta)) ** 2
        assert found.sums[number].item() == pytest.approx(expected, rel=2e-4)
        assert found.curves["reward_margin"][number].item() == pytest.approx(margin, rel=2e-3, abs=1e-4)
        assert found.curves["reward_accuracy"][number].item() == float(margin > 0)
    assert found.terms.tolist() == [1] * len(pairs)


def test_odds_near_certainty_stay_finite() -> None:
    log_p = torch.tensor([-1e-9, -1e-4, -0.5, -20.0, -200.0], dtype=torch.float32, requires_grad=True)
    values = _log1mexp(log_p)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(log_p.grad).all()
    for x, value in zip(log_p.tolist()[1:4], values.tolist()[1:4], strict=True):
        assert value == pytest.approx(math.log(-math.expm1(x)), rel=1e-4)
