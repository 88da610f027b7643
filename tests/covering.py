"""A few of many cases that have all that the cases have."""

from __future__ import annotations


def covering(cases: list[set]) -> list[int]:
    """Places of a few cases that together have all that the cases have."""
    left = set().union(*cases)
    chosen = []
    while left:
        new = [len(left & case) for case in cases]
        chosen.append(new.index(max(new)))
        left -= cases[chosen[-1]]
    return sorted(chosen)
