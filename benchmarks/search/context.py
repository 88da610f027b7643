"""What all sections share: vectors, exact ground truth, timing in turns, rows of the table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import lutra
from lutra import scan
from lutra.bench import data, interleaved

K = 10


@dataclass
class Row:
    """One comparison. Times in milliseconds a query (building and k-means: seconds in all)."""

    section: str
    case: str
    peer: str
    ours: float
    theirs: float | None = None
    recall: float | None = None
    peer_recall: float | None = None
    target: float | None = None
    unit: str = "ms/query"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.theirs / self.ours

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """The share of the true K neighbours among the first K that were found."""
    hits = sum(len(set(a[:K].tolist()) & set(b[:K].tolist())) for a, b in zip(found, truth))
    return hits / (K * len(found))


@dataclass
class Context:
    """Vectors and queries of unit norm, and what is asked of them."""

    n: int = 1_000_000
    d: int = 128
    queries: int = 1024
    quick: bool = False
    folder: Path | None = None
    budget: float = 6.0
    rows: list[Row] = field(default_factory=list)

    @cached_property
    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        return data.clustered(self.n, self.d, self.queries)

    @property
    def x(self) -> np.ndarray:
        return self.vectors[0]

    @property
    def q(self) -> np.ndarray:
        return self.vectors[1]

    @cached_property
    def truth(self) -> np.ndarray:
        """The exact neighbours, by inner product (unit norm: by distance too)."""
        return scan.knn(self.q, self.x, 100).ids

    @property
    def sample(self) -> np.ndarray:
        """What quantizers are trained on."""
        return self.x[: max(20_000, self.n // 10)]

    def time(self, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each, in turns."""
        return {name: t.median for name, t in interleaved(functions, self.budget).items()}

    def compare(
        self,
        section: str,
        case: str,
        peer: str,
        ours: Callable[[np.ndarray], Any],
        theirs: Callable[[np.ndarray], Any] | None,
        batches: Iterable[int] = (1, 1024),
        targets: Iterable[float | None] = (None, None),
        recalls: tuple[float | None, float | None] = (None, None),
        note: str = "",
    ) -> None:
        """Rows for some batch sizes; each function gets a matrix of queries."""
        for batch, target in zip(batches, targets):
            batch = min(batch, self.queries)
            queries = np.ascontiguousarray(self.q[:batch])
            functions = {"ours": lambda q=queries: ours(q)}
            if theirs is not None:
                functions["theirs"] = lambda q=queries: theirs(q)
            t = self.time(functions)
            self.add(
                Row(
                    section,
                    f"{case}, batch {batch}",
                    peer,
                    t["ours"] / batch * 1e3,
                    t["theirs"] / batch * 1e3 if theirs is not None else None,
                    *recalls,
                    target,
                    note=note,
                )
            )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)

    def write(self, path: Path) -> None:
        """The rows as JSON, with what the figures depend on."""
        import platform

        about = {
            "machine": platform.processor() or platform.machine(),
            "simd": lutra.simd_level(),
            "threads": lutra.get_num_threads(),
            "n": self.n,
            "d": self.d,
            "date": time.strftime("%Y-%m-%d"),
            "peers": {name: version(name) for name in ("faiss", "hnswlib", "scann", "turbovec")},
        }
        path.write_text(
            json.dumps({"about": about, "rows": [r.as_dict() for r in self.rows]}, indent=1) + "\n"
        )


def version(name: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    from importlib import metadata

    try:
        return metadata.version({"faiss": "faiss-cpu"}.get(name, name))
    except metadata.PackageNotFoundError:
        return None


def line(row: Row) -> str:
    """A row as text."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    verdict = ""
    if row.target is not None and row.ratio is not None:
        verdict = "met" if row.ratio >= row.target else "MISSED"
    return (
        f"{row.case:<44} {row.peer:<22} {row.ours:>9.4f} {number(row.theirs, '9.4f'):>9} "
        f"{number(row.ratio, '6.2f'):>6}x {number(row.target, '.1f'):>5} {verdict:<6} "
        f"{number(row.recall, '.3f'):>6} {number(row.peer_recall, '.3f'):>6}  {row.note}"
    )


HEADER = (
    f"{'case':<44} {'peer':<22} {'lutra':>9} {'peer':>9} {'ratio':>7} {'goal':>5} {'':<6} "
    f"{'recall':>6} {'peer':>6}"
)


def peer(name: str) -> Any:
    """A peer's module with its threads set; None, and a line that says so, where it is not installed."""
    module = data.installed(name)
    if module is None:
        print(f"  ({name} is not installed: its rows are left out)", file=sys.stderr)
    elif name == "faiss":
        module.omp_set_num_threads(lutra.get_num_threads())
    return module
