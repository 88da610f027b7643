"""Sections of bench_tables.py."""
