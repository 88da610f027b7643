"""Benchmarks of the cases in `lutra.bench.cases_nn`."""


def test_case(case, run_case):
    run_case(case)
