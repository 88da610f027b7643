"""Peak memory of a call; of a search beyond its inputs and outputs, in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROGRAM = """
import json, sys
import numpy as np
import lutra
from lutra.bench.memory import peak_growth

n, d, batch, k = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
x, q = rng.standard_normal((n, d), dtype=np.float32), rng.standard_normal((batch, d), dtype=np.float32)
lutra.scan.knn(q[:2], x[:100], k)  # threads and libraries are there before the mark is set
found = []
grown = peak_growth(lambda: found.append(lutra.scan.knn(q, x, k)))
print(max(0, grown - found[0].scores.nbytes - found[0].ids.nbytes))
"""


def knn_peak(n: int, d: int = 128, batch: int = 1024, k: int = 10) -> int:
    """Bytes that ``scan.knn`` of float32 (batch, d) queries on (n, d) rows takes at its peak, beyond queries,
    database and results."""
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps([n, d, batch, k])],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


def _peak() -> int:
    """The most bytes that this process has had: since the kernel's mark was set back, on Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def peak_growth(function: Callable[[], Any]) -> int:
    """Bytes that this process grows by, at the peak, while a function runs.

    Memory that was freed before is first given back to the system: taken again, it would not be seen. On
    Linux the figure is the kernel's own high-water mark, which misses nothing between two looks; elsewhere
    only what goes beyond the process's earlier peak is seen.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # no mark to set back
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    result = function()
    peak = _peak()
    del result
    return max(0, peak - before)
