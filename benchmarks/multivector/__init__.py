"""The sections of bench_multivector.py."""
