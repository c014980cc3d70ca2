"""Curves, events and logs: as JSON, as CSV, and live, where each event comes exactly once whatever breaks on the way."""

import json
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from core.events import StatusChanged, Warned
from core.states import JobStatus, Reason
from store import files, runs
from store.stream import Publisher
from tests.api.conftest import Plane, evaluation, places, problem, step

Live = tuple[str, str, dict[str, object]]


def live(client: httpx.Client, path: str, last: str | None = None) -> Iterator[Live]:
    """(event, id, data) of a stream, until it ends."""
    headers = {"Accept": "text/event-stream"} | ({} if last is None else {"Last-Event-ID": last})
    with client.stream("GET", path, headers=headers, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
            elif "data" in fields:
                yield fields["event"], fields["id"], json.loads(fields["data"])
                fields = {}


class Trainer:
    """A worker's two writers: the live stream at once, the record when told."""

    def __init__(self, plane: Plane, claim: runs.Claim) -> None:
        self.plane, self.claim, self.seq = plane, claim, 1
        self.publisher = Publisher(plane.redis_server.url)
        self.unsaved: list[object] = []

    def step(self, number: int) -> None:
        self.seq += 1
        event = step(self.seq, number)
        self.publisher.publish(self.claim.job_id, self.claim.attempt, [event])
        self.unsaved.append(event)

    def save(self) -> None:
        self.plane.record(self.claim, *self.unsaved)  # type: ignore[arg-type]
        self.unsaved = []

    def close(self) -> None:
        self.publisher.close()


@pytest.fixture
def trainer(plane: Plane, client: httpx.Client) -> Iterator[Trainer]:
    trainer = Trainer(plane, plane.running(client))
    yield trainer
    trainer.close()


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def steps_of(seen: list[Live]) -> list[object]:
    return [data["step"] for kind, _, data in seen if kind == "step"]


def test_points_are_paged_by_step_and_show_the_highest_attempt(plane: Plane, client: httpx.Client) -> None:
    first = plane.running(client)
    plane.record(first, *(step(n + 1, n, loss=n) for n in range(1, 5)), evaluation(6, 4))
    with plane.database.transaction() as session:
        runs.close_run(session, first, Reason.DRAINED, "")
    plane.record(plane.claim(first.job_id), step(2, 3, loss=30))
    path = f"/jobs/{first.job_id}/metrics"
    body = client.get(path).json()
    assert [(p["step"], p["attempt"], p["loss"]) for p in body["data"]] == [(1, 1, 1), (2, 1, 2), (3, 2, 30), (4, 1, 4)]
    assert body["data"][3]["eval_loss"] == 2.0
    assert body["has_more"] is False
    page = client.get(path, params={"after_step": 1, "limit": 2}).json()
    assert ([p["step"] for p in page["data"]], page["has_more"]) == ([2, 3], True)
    assert [p["loss"] for p in client.get(path, params={"attempt": 1}).json()["data"]] == [1, 2, 3, 4]
    assert client.get(path, params={"attempt": 9}).json() == {"data": [], "has_more": False}


def test_the_same_points_come_as_csv(plane: Plane, client: httpx.Client) -> None:
    claim = plane.running(client)
    plane.record(claim, step(2, 1, loss=1.5), evaluation(3, 1))
    answer = client.get(f"/jobs/{claim.job_id}/metrics", headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    head, line = answer.text.splitlines()
    row = dict(zip(head.split(","), line.split(","), strict=True))
    assert (row["step"], row["attempt"], row["loss"], row["eval_loss"], row["allocated_gib"]) == ("1", "1", "1.5", "2.0", "")


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
        ("text/csv;q=0.5, application/json;q=0.4", "text/csv"),
        ("application/json;q=0, */*", "text/csv"),
        ("text/*", "text/csv"),
        ("text/event-stream", "text/event-stream"),
    ],
)
def test_the_accept_header_chooses(plane: Plane, client: httpx.Client, accept: str, kind: str) -> None:
    job_id = plane.job(client)
    client.post(f"/jobs/{job_id}/cancel")
    answer = client.get(f"/jobs/{job_id}/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].partition(";")[0] == kind


def test_a_media_type_that_is_not_there_and_a_bad_place_are_refused(plane: Plane, client: httpx.Client) -> None:
    job_id = plane.job(client)
    problem(client.get(f"/jobs/{job_id}/metrics", headers={"Accept": "image/png"}), 406)
    problem(client.get(f"/jobs/{job_id}/events", headers={"Accept": "text/csv"}), 406)
    for headers in ({"Last-Event-ID": "seven"}, {"Last-Event-ID": "99999999999-1"}):
        body = problem(client.get(f"/jobs/{job_id}/metrics", headers=headers), 422)
        assert places(body) == {("bad-event-id", "")}
    body = problem(client.get(f"/jobs/{job_id}/metrics", params={"after_step": "x", "limit": 0}), 422)
    assert {error["field"] for error in body["errors"]} == {"after_step", "limit"}


def test_events_are_paged_in_order(plane: Plane, client: httpx.Client) -> None:
    claim = plane.running(client)
    plane.record(claim, Warned(seq=2, code="x", message="y"), step(3, 1))
    path, found, cursor = f"/jobs/{claim.job_id}/events", [], "0-0"
    while True:
        body = client.get(path, params={"cursor": cursor, "limit": 2}).json()
        found += [(event["id"], event["kind"]) for event in body["data"]]
        if not body["has_more"]:
            break
        cursor = body["next_cursor"]
    assert found == [("0-1", "status"), ("0-2", "status"), ("1-1", "status"), ("1-2", "warning"), ("1-3", "step")]
    assert [kind for kind, _, _ in live_until(client, path, 5)] == [kind for _, kind in found]


def live_until(client: httpx.Client, path: str, count: int) -> list[Live]:
    stream = live(client, path)
    return [next(stream) for _ in range(count)]


def test_a_live_stream_ends_after_the_last_status(plane: Plane, client: httpx.Client, trainer: Trainer) -> None:
    seen: list[Live] = []
    path = f"/jobs/{trainer.claim.job_id}/metrics"
    reader = in_background(lambda: seen.extend(live(client, path)))
    for number in range(1, 30):
        trainer.step(number)
        if number % 7 == 0:
            trainer.save()
    trainer.save()
    plane.finish(trainer.claim)
    reader.join(20)
    assert not reader.is_alive()
    assert steps_of(seen) == list(range(1, 30))
    assert [data["status"] for kind, _, data in seen if kind == "status"] == [
        "validating_files",
        "queued",
        "running",
        "succeeded",
    ]
    assert seen[-1][0] == "status"
    assert len({place for _, place, _ in seen}) == len(seen)
    assert seen[5][2].keys() >= {"attempt", "at", "step", "loss", "tokens_per_second", "eta_seconds"}
    assert list(live(client, path, seen[-1][1])) == []


def test_a_step_is_seen_before_the_record_has_it(client: httpx.Client, trainer: Trainer) -> None:
    stream = live(client, f"/jobs/{trainer.claim.job_id}/metrics")
    assert [next(stream)[0] for _ in range(3)] == ["status"] * 3
    trainer.step(1)
    assert next(stream)[2]["step"] == 1
    assert client.get(f"/jobs/{trainer.claim.job_id}/metrics").json()["data"] == []
    stream.close()


def test_cut_connections_get_each_event_exactly_once(plane: Plane, client: httpx.Client, trainer: Trainer) -> None:
    seen: list[Live] = []

    def read() -> None:
        cut = 1
        while not seen or seen[-1][2].get("status") != "succeeded":
            stream = live(client, f"/jobs/{trainer.claim.job_id}/metrics", seen[-1][1] if seen else None)
            for number, event in enumerate(stream, 1):
                seen.append(event)
                if number == cut:
                    break
            stream.close()
            cut = cut % 7 + 1

    reader = in_background(read)
    for number in range(1, 60):
        trainer.step(number)
        if number % 10 == 0:
            trainer.save()
        time.sleep(0.005)
    trainer.save()
    plane.finish(trainer.claim)
    reader.join(30)
    assert not reader.is_alive()
    assert steps_of(seen) == list(range(1, 60))


def test_redis_that_dies_in_the_middle_costs_no_event(plane: Plane, client: httpx.Client, trainer: Trainer) -> None:
    seen: list[Live] = []
    reader = in_background(lambda: seen.extend(live(client, f"/jobs/{trainer.claim.job_id}/metrics")))
    for number in range(1, 40):
        trainer.step(number)
        if number == 10:
            plane.redis_server.kill()
        if number % 6 == 0:
            trainer.save()
        if number == 25:
            plane.redis_server.start()  # empty, as after a crash: what it gets next leaves a gap
    trainer.save()
    plane.finish(trainer.claim)
    reader.join(30)
    assert not reader.is_alive()
    assert steps_of(seen) == list(range(1, 40))


def test_a_wiped_stream_is_filled_from_the_record(plane: Plane, client: httpx.Client, trainer: Trainer) -> None:
    for number in range(1, 11):
        trainer.step(number)
    trainer.save()
    plane.redis_server.wipe()
    stream = live(client, f"/jobs/{trainer.claim.job_id}/metrics", "1-4")
    assert [next(stream)[2]["step"] for _ in range(7)] == list(range(4, 11))
    trainer.step(11)
    assert next(stream)[2]["step"] == 11
    stream.close()


def test_the_stream_goes_on_into_the_next_attempt(plane: Plane, client: httpx.Client, trainer: Trainer) -> None:
    stream = live(client, f"/jobs/{trainer.claim.job_id}/metrics")
    seen = [next(stream) for _ in range(3)]
    trainer.step(1)
    trainer.step(2)
    trainer.save()
    with plane.database.transaction() as session:
        runs.close_run(session, trainer.claim, Reason.DRAINED, "")
    second = Trainer(plane, plane.claim(trainer.claim.job_id))
    second.step(2)
    second.save()
    plane.finish(second.claim)
    seen += stream
    second.close()
    places = [(kind, data["attempt"], data.get("step") or data.get("status")) for kind, _, data in seen[3:]]
    assert places == [
        ("step", 1, 1),
        ("step", 1, 2),
        ("status", 1, "queued"),
        ("status", 2, "running"),
        ("step", 2, 2),
        ("status", 2, "succeeded"),
    ]


def test_a_lost_run_whose_last_events_never_reached_the_record_still_ends_its_stream(
    plane: Plane, client: httpx.Client, trainer: Trainer
) -> None:
    stream = live(client, f"/jobs/{trainer.claim.job_id}/metrics")
    for _ in range(3):
        next(stream)
    for number in range(1, 5):
        trainer.step(number)
    assert [next(stream)[2]["step"] for _ in range(4)] == [1, 2, 3, 4]
    with plane.database.transaction() as session:
        change, _ = runs.close_run(session, trainer.claim, Reason.BAD_SPEC, "lost")
    assert isinstance(change, StatusChanged)
    [(kind, _, data)] = list(stream)
    assert (kind, data["status"]) == ("status", JobStatus.FAILED)


def test_logs_are_read_in_pieces(plane: Plane, client: httpx.Client, trainer: Trainer) -> None:
    job_id = trainer.claim.job_id
    path = f"/jobs/{job_id}/logs"
    empty = client.get(path)
    assert (empty.status_code, empty.text, empty.headers["x-next-offset"]) == (200, "", "0")
    log = plane.settings.home / "log"
    log.write_text("loading\nschön\n")
    plane.storage.put_file(log, files.log_key(job_id, 1))
    assert client.get(path).text == "loading\nschön\n"
    piece = client.get(path, params={"attempt": 1, "offset": 8, "limit": 3})
    assert (piece.content, piece.headers["x-next-offset"]) == (b"sch", "11")
    assert client.get(path, params={"attempt": 2}).text == ""
    assert client.get(path).headers["content-type"] == "text/plain; charset=utf-8"


def test_checkpoints_that_stand_are_listed(plane: Plane, client: httpx.Client, trainer: Trainer) -> None:
    for number in (10, 20, 30):
        with plane.database.transaction() as session:
            runs.record_checkpoint(session, trainer.claim, step=number, sha256="c", size=7)
    body = client.get(f"/jobs/{trainer.claim.job_id}/checkpoints").json()
    assert [(entry["step"], entry["attempt"], entry["bytes"]) for entry in body["data"]] == [(30, 1, 7), (20, 1, 7)]
