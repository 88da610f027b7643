"""The machinery of lutra.bench and the bench command; the cases themselves are run by benchmarks/ and CI."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from lutra import _backend, bench
from lutra.bench import Case, Limits, Prepared, Row, Timing, data, expect, interleaved, run_case
from lutra.bench.memory import knn_peak

compiled = pytest.mark.skipif(_backend.core is None, reason=f"no CPU module: {_backend.core_error}")
LIMITS = Limits(bandwidth=1e9, flops=1e10, threads=2, level="avx2")


def nothing() -> None:
    pass


def case(ours=nothing, check=nothing, **rest) -> Case:
    return Case("a case", "scan", lambda quick: Prepared(ours=ours, check=check, **rest))


# ---- timing
def test_interleaved_takes_turns():
    order: list[str] = []

    def function(name):
        def run():
            order.append(name)
            time.sleep(0.001)

        return run

    times = interleaved({name: function(name) for name in "abc"}, budget=0.5, rounds=3, settle=0)
    assert set(times) == {"a", "b", "c"}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(turns) == "abc" * (len(turns) // 3) and len(turns) >= 9


def test_interleaved_median_and_best(monkeypatch):
    durations = iter([1.0, 1.0, *[0.2, 0.2, 1.2] * 3])  # warm-up, calibration, three rounds of three
    monkeypatch.setattr("lutra.bench.timing._sample", lambda function, calls: next(durations))
    assert interleaved({"f": nothing}, budget=100, rounds=3, settle=0) == {"f": Timing(0.2, 0.2, 9)}


def test_interleaved_calls_a_slow_function_once():
    calls = []
    times = interleaved(
        {"slow": lambda: (calls.append(1), time.sleep(0.06)), "fast": nothing}, budget=0.1, settle=0
    )
    assert len(calls) == 1 and times["slow"].samples == 1 and times["slow"].median > 0.05
    assert times["fast"].median < 1e-4


def test_interleaved_stays_near_its_budget():
    start = time.perf_counter()
    interleaved({name: lambda: time.sleep(0.01) for name in "ab"}, budget=0.3, settle=0.01)
    assert time.perf_counter() - start < 1.5


# ---- limits
def test_limits_seconds():
    assert LIMITS.seconds(1e9, 1e9) == (1.0, "memory")
    assert LIMITS.seconds(1e8, 1e10) == (1.0, "FMA")


@compiled
def test_limits_are_plausible(simd_level):
    core = _backend.core
    assert core.measure_fma(1) > 1e9
    assert core.measure_bandwidth(1, 1 << 24) > 1e8


@compiled
def test_probes_name_what_they_got():
    with pytest.raises(ValueError, match=r"threads must be in .*, got 0"):
        _backend.core.measure_fma(0)
    with pytest.raises(ValueError, match="bytes must be >= 4096, got 1"):
        _backend.core.measure_bandwidth(1, 1)


# ---- cases
def test_run_case():
    row = run_case(
        case(peers={"numpy": lambda: time.sleep(0.001)}, bytes=1e6, flops=1.0, work=10, unit="queries"),
        LIMITS, quick=True, budget=0.05,
    )  # fmt: skip
    assert row.state == "ok" and row.ours is not None
    assert row.limit == 1e-3 and row.limit_of == "memory"
    assert row.share == pytest.approx(1e-3 / row.ours.median)
    assert row.ratio("numpy") > 10 and row.ratio("torch") is None
    json.dumps(row.as_json())


def test_run_case_finds_a_wrong_result():
    timed = []
    wrong = case(ours=lambda: timed.append(1), check=lambda: expect.equal([1, 2], [1, 3]))
    row = run_case(wrong, LIMITS, quick=True)
    assert row.state == "WRONG" and "Mismatched elements: 1 / 2" in row.note
    assert timed == [] and row.ours is None and row.share is None


def test_run_case_reports_an_exception():
    def fail():
        raise RuntimeError("no such kernel")

    row = run_case(case(check=fail), LIMITS, quick=True)
    assert row.state == "ERROR" and row.note == "RuntimeError: no such kernel"


def test_run_case_skips_without_its_module():
    row = run_case(
        Case("x", "scan", lambda quick: pytest.fail("prepared"), needs=("no_such_module",)), LIMITS
    )
    assert row.state == "skipped" and "no_such_module not installed" in row.note


def test_all_cases_have_names_of_their_own():
    names = [c.name for c in bench.all_cases()]
    assert len(set(names)) == len(names) > 20
    verbs = {"scan", "gather", "address", "nn", "tokens", "overhead", "tables"}
    assert {c.verb for c in bench.all_cases()} == verbs


# ---- expectations can fail
def search(queries, database, k):
    scores = queries @ database.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


def test_expect_neighbours():
    queries, database = data.vectors(3, 16), data.vectors(50, 16, seed=1)
    scores, ids = search(queries, database, 5)
    expect.neighbours((scores, ids), queries, database, 5, "ip")
    with pytest.raises(AssertionError, match="scores of query 0"):
        expect.neighbours((scores + 0.01, ids), queries, database, 5, "ip")
    with pytest.raises(AssertionError, match="their ids"):
        expect.neighbours((scores, ids[:, ::-1]), queries, database, 5, "ip")
    with pytest.raises(AssertionError, match="appears twice"):
        expect.neighbours((scores, np.repeat(ids[:, :1], 5, 1)), queries, database, 5, "ip")
    with pytest.raises(AssertionError, match="shapes"):
        expect.neighbours((scores, ids), queries, database, 4, "ip")
    worse = search(queries, database, 6)
    with pytest.raises(AssertionError, match="scores of query"):
        expect.neighbours((worse[0][:, 1:], worse[1][:, 1:]), queries, database, 5, "ip")
    with pytest.raises(AssertionError, match="scores of query"):
        expect.neighbours((scores, ids), queries, database, 5, "l2")


def test_expect_close_and_equal():
    expect.close(np.ones(3), [1, 1, 1 + 1e-6])
    with pytest.raises(AssertionError, match="what it is"):
        expect.close(np.ones(3), [1, 1, 1.1], what="what it is")
    with pytest.raises(AssertionError):
        expect.close(np.ones(3), np.ones((2, 1)))
    with pytest.raises(AssertionError, match="ids"):
        expect.equal([1], [2], what="ids")


def test_expect_reads_tensors():
    torch = pytest.importorskip("torch")
    assert expect.as_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).tolist() == [1, 1]


# ---- data
def test_data():
    assert data.vectors(4, 3) is data.vectors(4, 3)
    assert (data.vectors(4, 3) != data.vectors(4, 3, seed=1)).any()
    following = data.fresh([1, 2])
    assert [following() for _ in range(5)] == [1, 2, 1, 2, 1]
    ids = data.bag_ids(10, 4, 3, calls=2)
    assert len(ids) == 2 and ids[0].shape == (4, 3) and 0 <= ids[0].min() <= ids[0].max() < 10
    texts = data.texts(50_000)
    assert 50_000 <= sum(len(t.encode()) for t in texts) < 100_000 and len(texts) > 20
    assert data.installed("json") is json and data.installed("no_such_module") is None


# ---- memory
@compiled
def test_search_needs_little_memory():
    assert knn_peak(200_000, batch=256) < 64 << 20  # all scores would take 205 MB


def test_memory_of_a_search_that_writes_its_scores_is_seen(monkeypatch):
    monkeypatch.setenv("LUTRA_BACKEND", "reference")
    assert knn_peak(50_000, batch=32) > 6 << 20  # all scores: 6.4 MB


# ---- the command
@pytest.fixture
def command():
    for name in ("typer", "rich", "tqdm"):
        pytest.importorskip(name)
    from lutra.cli import bench as command

    return command


@pytest.fixture
def two_cases(command, monkeypatch):
    def fail():
        raise AssertionError("off by one")

    cases = [case(peers={"numpy": nothing}), Case("broken", "gather", lambda quick: Prepared(nothing, fail))]
    monkeypatch.setattr(command, "all_cases", lambda: cases)
    return cases


def test_show(command, two_cases, capsys, tmp_path):
    file = tmp_path / "out.json"
    command.show("a case", quick=True, json_file=file)
    out = capsys.readouterr().out
    assert "a case" in out and "broken" not in out
    written = json.loads(file.read_text())
    assert [r["state"] for r in written["results"]] == ["ok"]
    assert written["quick"] is True and written["machine"]["lutra"]
    assert written["results"][0]["seconds"]["lutra"]["median"] >= 0


def test_show_exits_with_1_where_a_result_is_wrong(command, two_cases, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.show("broken", quick=True)
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "off by one" in out


def test_show_names_what_there_is(command, two_cases, tmp_path):
    with pytest.raises(SystemExit, match="no benchmark's name contains 'zzz'; there are: a case, broken"):
        command.show("zzz", quick=True)
    with pytest.raises(SystemExit, match="does not exist"):
        command.show("a case", quick=True, json_file=tmp_path / "no" / "x.json")


def test_selected(command):
    names = [c.name for c in command.selected("knn ip", True)[0]]
    assert len(names) >= 3 and all("knn ip" in n for n in names)
    assert {c.verb for c in command.selected("gather", False)[0]} == {"gather"}
    assert not any(c.full_only for c in command.selected(None, True)[0])
    assert any(c.full_only for c in command.selected(None, False)[0])
    assert command.selected(None, True)[1] and not command.selected("bag", True)[1]


def test_texts(command):
    assert command.time_text(1.5) == "1.5 s"
    assert command.time_text(0.01234) == "12.3 ms"
    assert command.time_text(2e-6) == "2 µs"
    assert command.time_text(123e-6) == "123 µs"
    assert command.time_text(5e-8) == "50 ns"
    row = Row("x", "ok", ours=Timing(0.5, 0.5, 1), work=1000.0, unit="queries")
    assert command.rate_text(row) == "2 k queries/s"
    row.unit, row.work = "B", 1e9
    assert command.rate_text(row) == "2 GB/s"
    assert command.ratio_text(0.5) == "[red]0.50x[/]" and command.ratio_text(2) == "2.00x"
    assert "no compiled module" in command.heading(None)
