"""Running a case: prepare, check, time."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any

from .case import Case
from .limits import Limits
from .timing import SETTLE, Timing, interleaved


@dataclass
class Row:
    """The outcome of a case.

    ``state``: ``'ok'``, ``'WRONG'`` (the result), ``'ERROR'`` (an exception), ``'skipped'`` (something is not
    installed) or ``'memory'``; ``note`` says more.
    """

    name: str
    state: str
    note: str = ""
    ours: Timing | None = None
    peers: dict[str, Timing] = field(default_factory=dict)
    bytes: float = 0.0
    flops: float = 0.0
    work: float = 0.0
    unit: str = ""
    limit: float | None = None
    limit_of: str = ""

    def ratio(self, peer: str) -> float | None:
        """How many times faster than a peer; None where it was not measured."""
        if self.ours is None or peer not in self.peers:
            return None
        return self.peers[peer].median / self.ours.median

    @property
    def share(self) -> float | None:
        """The share of the machine's limit that was reached, 0 to about 1."""
        if self.ours is None or not self.limit:
            return None
        return self.limit / self.ours.median

    def as_json(self) -> dict[str, Any]:
        """Plain types for ``--json``; times in seconds."""
        out: dict[str, Any] = {"name": self.name, "state": self.state, "note": self.note}
        if self.ours is not None:
            out["seconds"] = {
                name: {"median": t.median, "best": t.best, "samples": t.samples}
                for name, t in {"lutra": self.ours, **self.peers}.items()
            }
            out["times_faster"] = {name: self.ratio(name) for name in self.peers}
            out.update(bytes=self.bytes, flops=self.flops, limit_of=self.limit_of or None, share=self.share)
            if self.unit:
                out["rate"] = {"per_second": self.work / self.ours.median, "unit": self.unit}
        return out


def missing(case: Case) -> list[str]:
    """The optional modules that a case needs and that are not installed."""
    return [name for name in case.needs if importlib.util.find_spec(name) is None]


def run_case(case: Case, limits: Limits | None, quick: bool = False, budget: float | None = None) -> Row:
    """Prepare, check and time a case; a wrong result or an exception makes a row that says so."""
    absent = missing(case)
    if absent:
        return Row(case.name, "skipped", f"{', '.join(absent)} not installed")
    try:
        prepared = case.prepare(quick)
        prepared.check()
    except Exception as error:  # one broken case must not hide the others' figures
        text = " ".join(str(error).split())
        if isinstance(error, AssertionError):
            return Row(case.name, "WRONG", text[:160])
        return Row(case.name, "ERROR", f"{type(error).__name__}: {text}"[:160])
    if budget is None:
        budget = 1.0 if quick else 6.0
    times = interleaved(
        {"lutra": prepared.ours, **prepared.peers}, budget, settle=SETTLE / 3 if quick else SETTLE
    )
    ours = times.pop("lutra")
    row = Row(
        case.name, "ok", ours=ours, peers=times, bytes=prepared.bytes, flops=prepared.flops,
        work=prepared.work, unit=prepared.unit,
    )  # fmt: skip
    if limits is not None and (prepared.bytes or prepared.flops):
        row.limit, row.limit_of = limits.seconds(prepared.bytes, prepared.flops)
        if not math.isfinite(row.limit):
            row.limit = None
    return row
