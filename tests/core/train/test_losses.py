"""The loss is the mean over trained tokens of the whole step, however the step is cut, and over nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from core.eval import nats
from core.eval.evaluate import evaluate_rows
from core.eval.nats import trained_nats
from core.eval.rows import IGNORED, Row, collate
from core.spec import SftObjective
from core.train.losses import sft_loss
from tests.core.train.runs import random_rows
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")


def as_rows(pairs: list[tuple[list[int], list[int]]]) -> list[Row]:
    return [(np.array(ids, np.int32), np.array(mask, np.uint8)) for ids, mask in pairs]


ROWS = as_rows(random_rows(8, seed=3))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_tiny_model(tmp_path_factory.mktemp("m") / "model", family=request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def reference_nats(model: Any, row: Row) -> list[float]:
    """Written from the definition: one unpadded row, full logits, one token at a time, in float64."""
    ids, mask = row
    logits = model(input_ids=torch.tensor([ids.tolist()])).logits[0].double()
    return [float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, int(ids[t])]) for t in range(1, len(ids)) if mask[t] == 1]


def test_a_padded_batch_has_the_loss_of_its_rows_alone(model: Any) -> None:
    batch = collate(ROWS, CPU)
    assert len({len(ids) for ids, _ in ROWS}) > 3, "the batch has to be padded"
    values, row = trained_nats(model, batch)
    for number, one in enumerate(ROWS):
        assert values[row == number].tolist() == pytest.approx(reference_nats(model, one), abs=1e-4)
    total, count = sft_loss(model, batch, SftObjective())
    assert count == sum(int(mask[1:].sum()) for _, mask in ROWS)
    assert total.item() == pytest.approx(sum(sum(reference_nats(model, one)) for one in ROWS), rel=1e-5)


def test_evaluation_reports_rows_in_their_order_and_keeps_the_mode(model: Any) -> None:
    model.train()
    found = evaluate_rows(model, ROWS, micro_batch_size=3, device=CPU, compute=torch.no_grad)
    assert model.training
    for (total, count), row in zip(found, ROWS, strict=True):
        expected = reference_nats(model, row)
        assert count == len(expected)
        assert total == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_do_not_depend_on_how_a_step_is_cut(model: Any, size: int) -> None:
    def gradients(micro_batch_size: int) -> list[torch.Tensor]:
        model.zero_grad()
        batches = [collate(ROWS[i : i + micro_batch_size], CPU) for i in range(0, len(ROWS), micro_batch_size)]
        trained = sum(batch.trained_tokens for batch in batches)
        for batch in batches:
            total, _ = sft_loss(model, batch, SftObjective())
            (total / trained).backward()
        return [p.grad.clone() for p in model.parameters()]

    whole, cut = gradients(8), gradients(size)
    scale = max(float(g.abs().max()) for g in whole)
    for one, other in zip(whole, cut, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * scale


def test_chunked_logits_give_the_same_loss_and_gradient(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total, _ = sft_loss(model, collate(ROWS, CPU), SftObjective())
        total.backward()
        return total.item(), model.get_input_embeddings().weight.grad.clone()

    whole = run()
    monkeypatch.setattr(nats, "LOGITS_PER_CHUNK", 5 * 512)
    chunked = run()
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
    assert torch.allclose(chunked[1], whole[1], atol=1e-5)


def test_prompt_and_padding_carry_no_label_and_the_end_token_does() -> None:
    end = 2
    batch = collate(as_rows([([5, 6, 7, end], [0, 0, 1, 1]), ([5, 6, 7, 8, 9, end], [1, 0, 0, 1, 1, 1])]), CPU)
    assert batch.labels.tolist() == [
        [IGNORED, IGNORED, 7, end, IGNORED, IGNORED],
        [IGNORED, IGNORED, IGNORED, 8, 9, end],
    ]
    assert (batch.tokens, batch.trained_tokens) == (10, 5)


def test_the_padding_id_may_be_a_trained_one() -> None:
    batch = collate(as_rows([([5, 0], [0, 1]), ([5, 6, 0], [0, 1, 1])]), CPU)
    assert batch.labels.tolist() == [[IGNORED, 0, IGNORED], [IGNORED, 6, 0]]
