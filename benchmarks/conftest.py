"""Fixtures of the benchmarks; see README.md beside."""

from __future__ import annotations

import pytest

from lutra.bench import Limits, Prepared, all_cases, data, interleaved


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="the sizes of the README's figures (10^6 rows), not the quick ones",
    )


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def limits(request):
    """The machine's limits; None where nothing is timed or nothing is compiled."""
    return None if request.config.getoption("benchmark_disable") else Limits.measure(quick=True)


@pytest.fixture
def measure(request, benchmark, limits, full):
    """``measure(prepared)``: check the result, time it, and time the peers against it in turns.

    ``extra_info`` gets bytes, flops, the share of the machine's limit and how many times faster than each
    peer it is. Returns those ratios; none under ``--benchmark-disable``, when only the check is run.
    """

    def run(prepared: Prepared, budget: float | None = None) -> dict[str, float]:
        prepared.check()
        benchmark.extra_info.update(bytes=prepared.bytes, flops=prepared.flops)
        benchmark(prepared.ours)
        if limits is None:
            return {}
        seconds, what = limits.seconds(prepared.bytes, prepared.flops)
        if seconds:
            share = seconds / benchmark.stats.stats.median
            benchmark.extra_info.update(share_of_limit=round(share, 3), limit_of=what)
        quick = min(1.0, 2 * float(request.config.getoption("benchmark_max_time")))
        times = interleaved({"lutra": prepared.ours, **prepared.peers}, budget or (6.0 if full else quick))
        ours = times.pop("lutra").median
        ratios = {name: timing.median / ours for name, timing in times.items()}
        benchmark.extra_info["times_faster_than"] = {name: round(r, 2) for name, r in ratios.items()}
        return ratios

    return run


@pytest.fixture
def run_case(measure, full):
    """``run_case(case)``: `measure` for a case of `lutra.bench`; skips where a module it needs is missing."""

    def run(case) -> dict[str, float]:
        for name in case.needs:
            pytest.importorskip(name)
        if case.full_only and not full:
            pytest.skip("only with --full")
        return measure(case.prepare(not full))

    return run


@pytest.fixture(scope="module", autouse=True)
def let_go_of_data():
    yield
    data.clear()


def pytest_generate_tests(metafunc):
    """A test with an argument ``case`` runs for every case of the verb that its file is named after."""
    if "case" in metafunc.fixturenames:
        verb = metafunc.module.__name__.rpartition("bench_")[2]
        cases = [case for case in all_cases() if case.verb == verb]
        metafunc.parametrize(
            "case", cases, ids=[case.name.replace(" ", "_").replace(",", "") for case in cases]
        )
