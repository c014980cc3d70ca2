"""Answers to a panel reach those who watch a job like any other event, and new curves have their columns."""

import httpx

from core.events import Answer, Answered, Evaluation
from core.states import Reason
from store import runs
from store.stream import Publisher
from tests.api.conftest import Plane, step
from tests.api.test_metrics import live

ANSWERS = [
    Answer(prompt="Who are you?", text='A "model"\n今天', reference=None, finish_reason="stop"),
    Answer(prompt="And I?", text="", reference=None, finish_reason="length"),
]


def test_answers_are_in_the_history_and_in_the_live_stream(plane: Plane, client: httpx.Client) -> None:
    claim = plane.running(client)
    events = [step(2, 1), Answered(seq=3, step=1, source="panel", answers=ANSWERS), step(4, 2)]
    publisher = Publisher(plane.redis_server.url)
    try:
        publisher.publish(claim.job_id, claim.attempt, events)
    finally:
        publisher.close()
    path = f"/jobs/{claim.job_id}/events"
    wanted = {"step": 1, "source": "panel", "answers": [answer.model_dump() for answer in ANSWERS]}

    seen = []
    for kind, place, data in live(client, path):  # not recorded yet: what comes now comes from the stream
        seen.append((kind, place, data))
        if kind == "answers":
            plane.record(claim, *events)
            with plane.database.transaction() as session:
                runs.close_run(session, claim, Reason.BAD_SPEC, "over")
    [answered] = [(place, data["data"]) for kind, place, data in seen if kind == "answers"]
    assert answered == ("1-3", wanted)
    assert [data["kind"] for _, _, data in seen] == [kind for kind, _, _ in seen]

    body = client.get(path, params={"cursor": "1-2", "limit": 1}).json()
    assert [(event["id"], event["kind"], event["data"]) for event in body["data"]] == [("1-3", "answers", wanted)]
    # The metrics stream has curves only.
    kinds = {kind for kind, _, _ in live(client, f"/jobs/{claim.job_id}/metrics")}
    assert kinds == {"step", "status"}


def test_scores_of_answers_are_curves(plane: Plane, client: httpx.Client) -> None:
    claim = plane.running(client)
    measured = {"eval_exact_match": 0.25, "eval_bleu": 31.5, "eval_rouge_l": 0.5, "eval_reward_accuracy": None}
    plane.record(claim, Evaluation(seq=2, step=0, eval_loss=2.0, eval_trained_tokens=5, row_losses=[], **measured))
    [point] = client.get(f"/jobs/{claim.job_id}/metrics").json()["data"]
    assert point == {
        "step": 0,
        "attempt": 1,
        "eval_loss": 2.0,
        "eval_trained_tokens": 5.0,
        "eval_exact_match": 0.25,
        "eval_bleu": 31.5,
        "eval_rouge_l": 0.5,
    }
    head, line = client.get(f"/jobs/{claim.job_id}/metrics", headers={"Accept": "text/csv"}).text.splitlines()
    row = dict(zip(head.split(","), line.split(","), strict=True))
    assert (row["eval_bleu"], row["eval_perplexity"], row["reward_margin"]) == ("31.5", "", "")
