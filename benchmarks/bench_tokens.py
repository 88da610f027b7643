"""Benchmarks of the cases in `lutra.bench.cases_tokens`."""


def test_case(case, run_case):
    run_case(case)
