"""benchmarks.serve: whole answers of distinct prompts, or no number; on the tiny model."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import endpoint, serve
from benchmarks.waves import RANK, Asked, Bench, NoMeasurementError, closed, greedy, opened, wave, write_adapter
from core.infer.progress import End
from core.infer.ticket import Failed


@pytest.fixture
def bench(tiny: Path) -> Iterator[Bench]:
    made = Bench(tiny, kv_gib=0.01, most_clients=8)
    yield made
    made.close()


def measured(monkeypatch: pytest.MonkeyPatch, tiny: Path, out: Path, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    asked = ["--models", str(tiny.parent), "--out", str(out), "--commit", "none", "--kv-gib", "0.01"]
    monkeypatch.setattr(sys, "argv", ["serve", *asked, "--prompt-tokens", "12", "--tokens", "6", *arguments])
    serve.main()
    (file,) = out.glob("serve-*.json")
    return {(row["case"], row["metric"]): row for row in json.loads(file.read_text())["rows"]}


def test_waves_with_a_loop_and_a_baseline_beside_them(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--cases", "tiny/2-adapters/c3,tiny/base/c3", "--waves", "2", "--baseline", "--loop", "open", "--rate", "200"]
    found = measured(monkeypatch, tiny, tmp_path, *asked, "--profile", "--requests", "4")
    for case in ("tiny/2-adapters/c3", "tiny/base/c3"):
        assert found[case, "tokens_per_second"]["n"] == found[case, "baseline_tokens_per_second"]["n"] == 2
        assert found[f"{case}/open-200", "first_token_ms_p50"]["n"] == 4
        assert found[f"{case}/open-200", "inter_token_ms_p99"]["n"] == 4 * 5
        times = [found[f"{case}/open-200", f"first_token_ms_p{percentile}"]["value"] for percentile in (50, 90, 99)]
        assert 0 < times[0] <= times[1] <= times[2]
    assert {row["must"] for row in found.values()} == {None}, "what was promised is a GPU's"


def test_shares_and_cold_adapters(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "RETENTION_CLIENTS", 2)
    monkeypatch.setattr(serve, "COLD_TRIES", 2)
    found = measured(monkeypatch, tiny, tmp_path, "--cases", "tiny/retention-1,tiny/cold-adapter,tiny/3-clients", "--waves", "2")
    assert found["tiny/retention-1", "share_of_base"]["value"] > 0
    assert found["tiny/cold-adapter", "added_first_token_ms"]["n"] == 2
    speeds = [
        found["tiny/3-clients", metric]["value"] for metric in ("best_tokens_per_second", "best_one_by_one_tokens_per_second")
    ]
    assert found["tiny/3-clients", "times_one_by_one"]["value"] == pytest.approx(speeds[0] / speeds[1])


def test_a_case_that_fails_leaves_the_rows_of_the_others(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--cases", "tiny/base/c99999999,tiny/base/c2", "--waves", "1"]
    given = serve.Cases._speed

    def failing(cases: Any, servables: list[Any], clients: int) -> float:
        if clients > 2:
            raise NoMeasurementError("too many")
        return given(cases, servables, clients)

    monkeypatch.setattr(serve.Cases, "_speed", failing)
    with pytest.raises(SystemExit, match="tiny/base/c99999999: NoMeasurementError: too many"):
        measured(monkeypatch, tiny, tmp_path, *asked)
    (file,) = tmp_path.glob("serve-*.json")
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["tiny/base/c2"]


def test_the_promised_metric_of_a_promised_case_has_its_marks(tmp_path: Path) -> None:
    results = serve.Results("serve", "D", folder=tmp_path, commit="none")
    serve.add(results, "8b/cold-adapter", "added_first_token_ms", 50.0, "ms", better="lower")
    serve.add(results, "8b/cold-adapter", "resident_first_token_ms", 50.0, "ms", better="lower")
    rows = json.loads(results.path.read_text())["rows"]
    assert [(row["must"], row["aim"]) for row in rows] == [(150, 40), (None, None)]


def test_requests_of_every_load_come_to_their_end(bench: Bench, tmp_path: Path) -> None:
    adapter = bench.served(write_adapter(bench.host.model, tmp_path / "a", 1), "a")
    assert adapter.weights is not None
    assert len(adapter.weights.sites) == 14, "seven in each layer, and no head"
    assert {site.down.shape[0] for site in adapter.weights.sites.values()} == {RANK}
    assert wave(bench.engine, [bench.base, adapter], bench.prompts(4, 8), 3) > 0
    for found in (
        closed(bench.engine, [adapter], bench.prompts(5, 8), 3, clients=2),
        opened(bench.engine, [adapter], bench.prompts(5, 8), 3, at=bench.arrivals(5, 500)),
    ):
        assert [len(asked.stamps) for asked in found] == [3] * 5
        assert all(asked.first_token_seconds > 0 and len(asked.gaps) == 2 for asked in found)
    assert bench.engine.load == 0


def test_prompts_are_distinct_and_the_clock_of_arrivals_is_poisson(bench: Bench) -> None:
    prompts = [tuple(prompt) for prompt in [*bench.prompts(50, 8), *bench.prompts(50, 8)]]
    assert len(set(prompts)) == 100
    assert bench.arrivals(4000, 20.0)[-1] == pytest.approx(200, rel=0.1)


@pytest.mark.parametrize(("last", "said"), [(Failed("out of memory"), "out of memory"), (End("length", ""), "has 0 tokens")])
def test_an_answer_that_is_not_whole_gives_no_number(bench: Bench, last: Failed | End, said: str) -> None:
    class Broken:
        def submit(self, servable: Any, prompt: list[int], sampling: Any, deliver: Asked) -> None:
            deliver(last)

    with pytest.raises(NoMeasurementError, match=said):
        closed(Broken(), [bench.base], bench.prompts(1, 8), greedy(2).max_tokens, clients=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", serve.CASES)
def test_every_case_has_a_model(case: str) -> None:
    from benchmarks.shapes import SHAPES

    assert serve.MODELS[case.split("/")[0]] in SHAPES


def test_http_is_measured_through_a_running_endpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "ADAPTERS", 2)
    monkeypatch.setattr(endpoint, "CLIENTS", 3)
    found = measured(monkeypatch, tiny, tmp_path, "--cases", "tiny/http", "--waves", "1")
    assert found["tiny/http", "tokens_per_second"]["value"] > 0
    assert found["tiny/http", "share_of_engine"]["value"] > 0


def test_a_trained_adapter_answers_and_every_stop_on_the_way_is_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(monkeypatch, tiny, tmp_path, "--cases", "tiny/train-to-serve", "--waves", "1")
    seconds = {metric.removesuffix("_seconds"): row["value"] for (_, metric), row in found.items()}
    stops = ("ended_to_published", "published_to_deployed", "deployed_to_checked", "checked_to_first_token")
    assert seconds["ended_to_first_token"] == pytest.approx(sum(seconds[stop] for stop in stops))
    assert seconds["ended_to_first_token"] > 0
    assert seconds["last_step_to_ended"] > 0, "its result and its parity record are written by then"
    checks = {metric for metric in seconds if metric.startswith("check_")}
    made = ("manifest", "base_identity", "load", "template", "token_ids", "modules", "parity", "effect")
    assert checks == {f"check_{check}" for check in made}
