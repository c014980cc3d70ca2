"""Jobs over HTTP: submit once, refuse with every reason at once, plan, list, cancel."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from core.spec import JobSpec
from store.tables import Audit, Idempotency, Job, Outbox, WorkerNode
from tests.api.conftest import Plane, counts, places, problem


def jobs_in(plane: Plane) -> int:
    with plane.database.transaction() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def test_a_job_is_accepted_with_its_defaults_written_out(plane: Plane, client: httpx.Client) -> None:
    dataset_id = plane.ready_dataset(client)
    spec = plane.spec(dataset_id, adapter_name="mine", metadata={"team": "search"})
    answer = client.post("/jobs", json=spec)
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["status"] == "validating_files"
    assert job["spec"] == JobSpec.model_validate(spec).model_dump(mode="json")
    assert client.get(f"/jobs/{job['id']}").json() == job
    with plane.database.transaction() as session:
        assert session.scalars(select(Outbox.key)).all() == [job["id"]]
        assert ("job.create", job["id"]) in {(row.action, row.object_id) for row in session.scalars(select(Audit))}


def test_a_job_on_a_dataset_that_is_still_validating_is_accepted(plane: Plane, client: httpx.Client) -> None:
    dataset_id = plane.upload(client).json()["id"]
    assert client.post("/jobs", json=plane.spec(dataset_id)).json()["status"] == "validating_files"


def test_a_job_is_accepted_while_redis_is_away(plane: Plane, client: httpx.Client) -> None:
    dataset_id = plane.ready_dataset(client)
    plane.redis_server.kill()
    job_id = client.post("/jobs", json=plane.spec(dataset_id)).json()["id"]
    with plane.database.transaction() as session:
        bell = session.scalars(select(Outbox)).one()
        assert (bell.key, bell.sent_at) == (job_id, None)


def test_everything_the_record_knows_against_a_spec_is_said_at_once(plane: Plane, client: httpx.Client) -> None:
    failed = plane.upload(client).json()["id"]
    plane.validate(failed, usable_rows=0)
    body = problem(
        client.post(
            "/jobs",
            json={
                "base_model": "tiny",
                "adapter_name": "tiny",
                "tuning": {"kind": "lora", "target_modules": ["q_proj", "qkv"]},
                "data": {"datasets": [{"dataset_id": failed}, {"dataset_id": "ds_unknown00"}], "max_length": 513},
                "eval": {"every_steps": 5},
            },
        ),
        422,
    )
    assert places(body) == {
        ("name-taken", "/adapter_name"),
        ("unknown-target-module", "/tuning/target_modules/1"),
        ("failed-dataset", "/data/datasets/0/dataset_id"),
        ("unknown-dataset", "/data/datasets/1/dataset_id"),
        ("max-length-exceeds-context", "/data/max_length"),
        ("no-eval-rows", "/eval/every_steps"),
    }
    assert body["error_count"] == 6
    assert jobs_in(plane) == 0


def test_an_unknown_model_is_answered_with_the_known_ones(plane: Plane, client: httpx.Client) -> None:
    body = problem(client.post("/jobs", json=plane.spec(plane.ready_dataset(client), base_model="tinny")), 422)
    assert places(body) == {("unknown-model", "/base_model")}
    assert body["errors"][0]["message"] == "There is no model tinny; registered: org/Small, tiny"


def test_rows_held_out_must_leave_some(plane: Plane, client: httpx.Client) -> None:
    dataset_id = plane.ready_dataset(client)
    data = {"datasets": [{"dataset_id": dataset_id}], "eval_rows": 12}
    body = problem(client.post("/jobs", json={"base_model": "tiny", "data": data}), 422)
    assert places(body) == {("too-few-rows", "/data/eval_rows")}


def test_texts_held_out_are_counted_when_they_are_tokenised(plane: Plane, client: httpx.Client) -> None:
    data = {"datasets": [{"dataset_id": plane.ready_dataset(client, "text")}], "eval_rows": 12}
    body = {"base_model": "tiny", "objective": {"kind": "plain_text"}, "data": data}
    assert client.post("/jobs", json=body).status_code == 201


@pytest.mark.parametrize(
    ("kind", "format_name", "said"),
    [
        ("sft", "preference", "preference rows (format preference), which are for objective dpo or orpo; objective sft"),
        ("dpo", "alpaca", "conversation rows (format alpaca), which are for objective sft; objective dpo trains on preference"),
        ("orpo", "text", "text rows (format text), which are for objective plain_text; objective orpo"),
        ("plain_text", "preference", "objective plain_text trains on text rows"),
    ],
)
def test_rows_of_a_kind_that_the_objective_has_no_use_for_are_refused(
    plane: Plane, client: httpx.Client, kind: str, format_name: str, said: str
) -> None:
    fits = {"sft": "alpaca", "dpo": "preference", "orpo": "preference", "plain_text": "text"}[kind]
    datasets = [{"dataset_id": plane.ready_dataset(client, name)} for name in (fits, format_name)]
    spec = {"base_model": "tiny", "objective": {"kind": kind}, "data": {"datasets": datasets, "max_length": 64}}
    for path in ("/jobs", "/jobs/plan"):
        body = problem(client.post(path, json=spec), 422)
        assert places(body) == {("wrong-data-kind", "/data/datasets/1/dataset_id")}
        assert body["errors"][0]["message"].startswith(f"{datasets[1]['dataset_id']} holds ")
        assert said in body["errors"][0]["message"]
    datasets.pop()
    assert client.post("/jobs", json=spec).status_code == 201


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"learning_rate": 1}, {("unknown-field", "/learning_rate"): "optim.learning_rate"}),
        ({"tuning": {"kind": "lora", "rnk": 4}}, {("unknown-field", "/tuning/rnk"): "rank"}),
        ({"tuning": {"kind": "lora", "rank": 0, "alpha": 0}}, {("greater-than-equal", "/tuning/rank"): "1"}),
        ({"tuning": {"kind": "dora"}}, {("union-tag-invalid", "/tuning"): "'lora', 'mora', 'full'"}),
        ({"optim": {"learning_rate": "0.1"}}, {("float-type", "/optim/learning_rate"): "valid number"}),
        ({"seed": -1}, {("greater-than-equal", "/seed"): "0"}),
        ({"seed": True}, {("int-type", "/seed"): "integer"}),
        ({"seed": 10**30}, {("less-than-equal", "/seed"): "2147483647"}),
        ({"base_model": "../../etc"}, {("string-pattern-mismatch", "/base_model"): "pattern"}),
        ({"base_model": "https://example.org/m"}, {("string-pattern-mismatch", "/base_model"): "pattern"}),
        ({"metadata": {"k": "a\x00b"}}, {("string-pattern-mismatch", "/metadata/k"): "pattern"}),
        ({"trust_remote_code": True}, {("unknown-field", "/trust_remote_code"): ""}),
        ({"allow_remote_code": True}, {("unknown-field", "/allow_remote_code"): ""}),
        ({"quantization": {"kind": "nf4"}, "tuning": {"kind": "full"}}, {("value-error", ""): "full tuning"}),
        ({"data": {"datasets": []}}, {("too-short", "/data/datasets"): "at least 1"}),
        ({"data": {}}, {("missing-field", "/data/datasets"): "required"}),
    ],
)
def test_an_impossible_spec_is_refused_with_pointer_and_reason(
    plane: Plane, client: httpx.Client, fields: dict[str, Any], expected: dict[tuple[str, str], str]
) -> None:
    for path in ("/jobs", "/jobs/plan"):
        body = problem(client.post(path, json=plane.spec("ds_aaaaaaaaaaaa", **fields)), 422)
        for place, part in expected.items():
            [message] = [e["message"] for e in body["errors"] if (e["code"], e.get("pointer", "")) == place]
            assert part in message
    assert jobs_in(plane) == 0


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"base_model": ', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"seed": ' + b"1" * 5000 + b"}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"", "application/json", 422),
        (b"[]", "application/json", 422),
        (b'{"base_model": "\\ud800"}', "application/json", 422),
        (b'{"optim": {"learning_rate": NaN}}', "application/json", 422),
        (b'{"a": "' + b"x" * (256 << 10) + b'"}', "application/json", 413),
    ],
)
def test_a_body_that_is_no_spec_is_refused(client: httpx.Client, content: bytes, kind: str, status: int) -> None:
    problem(client.post("/jobs", content=content, headers={"Content-Type": kind}), status)


def test_a_body_over_the_cap_is_refused_without_a_declared_length_too(client: httpx.Client) -> None:
    pieces = iter([b"[" + b" " * (200 << 10), b" " * (200 << 10)])
    problem(client.post("/jobs", content=pieces, headers={"Content-Type": "application/json"}), 413)


def test_many_reasons_are_counted_and_cut(client: httpx.Client) -> None:
    body = problem(client.post("/jobs", json={f"field{n}": 1 for n in range(150)}), 422)
    assert len(body["errors"]) == 100
    assert body["error_count"] == 152  # base_model and data are missing too


def test_an_idempotency_key_makes_one_job_however_often_it_is_sent(plane: Plane, client: httpx.Client) -> None:
    spec = plane.spec(plane.ready_dataset(client))
    headers = {"Idempotency-Key": "abc"}
    first = client.post("/jobs", json=spec, headers=headers)
    plane.prepare(first.json()["id"])
    again = client.post("/jobs", json=spec, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    body = problem(client.post("/jobs", json=spec | {"seed": 1}, headers=headers), 422)
    assert places(body) == {("idempotency-key-reused", "Idempotency-Key")}
    problem(client.post("/jobs", json=spec, headers={"Idempotency-Key": "x" * 300}), 422)
    assert jobs_in(plane) == 1


def test_of_concurrent_posts_with_one_key_one_makes_the_job_and_all_get_it(plane: Plane, client: httpx.Client) -> None:
    spec = plane.spec(plane.ready_dataset(client))
    clients = [plane.client() for _ in range(12)]

    def post(own: httpx.Client) -> httpx.Response:
        return own.post("/jobs", json=spec, headers={"Idempotency-Key": "same"})

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(post, clients))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert jobs_in(plane) == 1


def test_a_key_is_free_again_after_a_refusal(plane: Plane, client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "later"}
    problem(client.post("/jobs", json=plane.spec("ds_aaaaaaaaaaaa"), headers=headers), 422)
    assert client.post("/jobs", json=plane.spec(plane.ready_dataset(client)), headers=headers).status_code == 201
    with plane.database.transaction() as session:
        assert session.scalar(select(func.count()).select_from(Idempotency)) == 1


def test_a_plan_says_what_would_be_done_and_does_nothing(plane: Plane, client: httpx.Client) -> None:
    spec = plane.spec(plane.ready_dataset(client), batch={"micro_batch_size": 2, "gradient_accumulation_steps": 2})
    plan = client.post("/jobs/plan", json=spec).json()
    assert (plan["ready"], plan["steps"], plan["fits"], plan["budget_gib"]) == (False, None, None, None)
    assert jobs_in(plane) == 0
    plane.prepare(client.post("/jobs", json=spec).json()["id"])
    with plane.database.transaction() as session:
        session.add(WorkerNode(boot_id="w", name="w", queues=["gpu"], device="cpu", budget_gib=8.0))
    plan = client.post("/jobs/plan", json=spec).json()
    assert (plan["ready"], plan["train_rows"], plan["steps"], plan["fits"], plan["budget_gib"]) == (True, 12, 3, True, 8.0)
    assert plan["tokens"] == [counts(spec["data"]["datasets"][0]["dataset_id"]).model_dump(mode="json")]
    problem(client.post("/jobs/plan", json=spec | {"base_model": "nobody"}), 422)


def test_a_job_that_fits_no_worker_is_refused_with_the_numbers_and_the_way_out(plane: Plane, client: httpx.Client) -> None:
    spec = plane.spec(plane.ready_dataset(client), tuning={"kind": "full"}, batch={"micro_batch_size": 16})
    with plane.database.transaction() as session:
        session.add(WorkerNode(boot_id="w", name="w", queues=["gpu"], device="NVIDIA H100 80GB HBM3", budget_gib=0.001))
    plan = client.post("/jobs/plan", json=spec).json()
    assert plan["fits"] is False
    assert plan["memory"]["total_gib"] == pytest.approx(sum(v for k, v in plan["memory"].items() if k != "total_gib"))
    assert all(knob["total_gib"] < plan["memory"]["total_gib"] for knob in plan["knobs"])
    body = problem(client.post("/jobs", json=spec), 422)
    assert places(body) == {("does-not-fit", "/batch/micro_batch_size")}
    assert "plans with 0.0" in body["errors"][0]["message"]
    assert jobs_in(plane) == 0
    with plane.database.transaction() as session:
        session.get(WorkerNode, "w").budget_gib = 80.0
    assert client.post("/jobs", json=spec).status_code == 201


def test_lists_filter_and_page_newest_first(plane: Plane, client: httpx.Client) -> None:
    dataset_id = plane.ready_dataset(client)
    bases = ["tiny", "org/Small", "tiny", "tiny", "org/Small"]
    made = [client.post("/jobs", json=plane.spec(dataset_id, base_model=base)).json()["id"] for base in bases]
    client.post(f"/jobs/{made[2]}/cancel")

    def ids(**filters: str) -> list[str]:
        return [job["id"] for job in client.get("/jobs", params=filters).json()["data"]]

    assert ids() == made[::-1]
    assert ids(base_model="org/Small") == [made[4], made[1]]
    assert ids(status="cancelled") == [made[2]]
    first = client.get("/jobs", params={"limit": 3}).json()
    second = client.get("/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == made[::-1]
    assert (second["has_more"], second["next_cursor"]) == (False, None)
    problem(client.get("/jobs", params={"cursor": "job_nobody"}), 404)
    body = problem(client.get("/jobs", params={"status": "done", "limit": 0, "cursor": "?"}), 422)
    assert {error["field"] for error in body["errors"]} == {"status", "limit", "cursor"}


def test_cancel_ends_a_waiting_job_and_asks_a_running_one(plane: Plane, client: httpx.Client) -> None:
    waiting = plane.job(client)
    assert client.post(f"/jobs/{waiting}/cancel").json()["status"] == "cancelled"
    assert client.post(f"/jobs/{waiting}/cancel").status_code == 200
    claim = plane.running(client)
    asked = client.post(f"/jobs/{claim.job_id}/cancel").json()
    assert asked["status"] == "running"
    assert asked["cancel_requested_at"]
    done = plane.running(client)
    plane.finish(done)
    body = problem(client.post(f"/jobs/{done.job_id}/cancel"), 409)
    assert body["type"] == "/problems/conflict"
    problem(client.post("/jobs/job_nobody/cancel"), 404)
