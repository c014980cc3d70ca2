"""A job may ask for the operator's judge model where there is one; nobody but the operator says where it is."""

import httpx

from core.events import Judged
from tests.api.conftest import Plane, places, problem, serve, step

ASKS = {"generation": {"rows": 4}, "judge": True}
JUDGE = {"judge_url": "http://127.0.0.1:9/v1", "judge_model": "m"}


def asking(plane: Plane, client: httpx.Client) -> dict[str, object]:
    spec = plane.spec(plane.ready_dataset(client), eval=ASKS)
    return spec | {"data": spec["data"] | {"eval_rows": 4}}


def test_a_judge_that_is_not_there_is_refused_at_submit(plane: Plane, client: httpx.Client) -> None:
    spec = asking(plane, client)
    for path in ("/jobs", "/jobs/plan"):
        body = problem(client.post(path, json=spec), 422)
        assert places(body) == {("no-judge", "/eval/judge")}
        assert "STROP_JUDGE_URL" in body["errors"][0]["message"]
    assert client.get("/jobs").json()["data"] == []


def test_a_judge_that_the_operator_set_up_is_accepted(plane: Plane, client: httpx.Client) -> None:
    spec = asking(plane, client)
    with serve(plane.settings.model_copy(update=JUDGE)) as url:
        for path, status in (("/jobs/plan", 200), ("/jobs", 201)):
            answer = client.post(url + path, json=spec)
            assert answer.status_code == status, answer.text
            assert "127.0.0.1:9" not in answer.text
        assert answer.json()["spec"]["eval"]["judge"] is True


def test_a_judge_marks_generated_answers_and_has_no_address_in_a_spec(plane: Plane, client: httpx.Client) -> None:
    spec = asking(plane, client)
    body = problem(client.post("/jobs", json=spec | {"eval": {"judge": True}}), 422)
    assert places(body) == {("value-error", "/eval")}
    assert "set generation" in body["errors"][0]["message"]
    for field in ("judge_url", "judge_model"):
        body = problem(client.post("/jobs", json=spec | {"eval": ASKS | {field: "http://169.254.169.254"}}), 422)
        assert places(body) == {("unknown-field", f"/eval/{field}")}


def test_the_mean_mark_is_a_curve(plane: Plane, client: httpx.Client) -> None:
    claim = plane.running(client)
    marked = {"model": "m", "asked": 3, "marked": 2, "judge_score": 6.5, "scores": [6, None, 7]}
    plane.record(claim, step(2, 3), Judged(seq=3, step=3, adapter_step=2, **marked))
    [point] = client.get(f"/jobs/{claim.job_id}/metrics").json()["data"]
    assert (point["step"], point["loss"], point["judge_score"]) == (3, 1.0, 6.5)
    head, line = client.get(f"/jobs/{claim.job_id}/metrics", headers={"Accept": "text/csv"}).text.splitlines()
    assert dict(zip(head.split(","), line.split(","), strict=True))["judge_score"] == "6.5"
    [event] = [e for e in client.get(f"/jobs/{claim.job_id}/events").json()["data"] if e["kind"] == "judged"]
    assert event["data"] == {"step": 3, "adapter_step": 2, **marked}
