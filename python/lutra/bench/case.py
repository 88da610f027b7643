"""What a microbenchmark consists of, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Prepared:
    """A case with its data, ready to be checked and timed.

    Attributes
    ----------
    ours : callable without arguments
        One call of the op.
    peers : dict of str to callable
        The same work by ``'numpy'``, ``'torch'`` or ``'faiss'``; further keys get a line in the JSON only.
    check : callable without arguments
        Raises AssertionError where our result is wrong: not what a peer or a computation of its own gives.
    bytes : float
        Bytes that must at least come from memory in one call: 0 where everything stays in a cache.
    flops : float
        fp32 operations of one call that are multiply-adds, 2 for each.
    work : float
        How many units (queries, bytes of text) one call does, for `unit`.
    unit : str
        Of the rate in the table: ``'queries'``, ``'B'``; empty where the time says enough.
    """

    ours: Callable[[], Any]
    check: Callable[[], None]
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    work: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Case:
    """A named microbenchmark; ``prepare(quick)`` makes the data and returns a `Prepared`.

    ``needs`` names the optional modules without which there is nothing to measure. A quick run leaves
    ``full_only`` cases out.
    """

    name: str
    verb: str
    prepare: Callable[[bool], Prepared]
    needs: tuple[str, ...] = ()
    full_only: bool = False


def all_cases() -> list[Case]:
    """Every case, in the order of the table."""
    from . import (
        cases_address,
        cases_gather,
        cases_nn,
        cases_optim,
        cases_overhead,
        cases_pieces,
        cases_scan,
        cases_tables,
        cases_tokens,
    )

    return [
        *cases_scan.CASES,
        *cases_gather.CASES,
        *cases_pieces.CASES,
        *cases_address.CASES,
        *cases_nn.CASES,
        *cases_optim.CASES,
        *cases_tables.CASES,
        *cases_tokens.CASES,
        *cases_overhead.CASES,
    ]
