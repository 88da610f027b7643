"""Peak memory of a call; of a search beyond its inputs and outputs, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROGRAM = """
import json, resource, sys
import numpy as np
import lutra

def peak():  # bytes; the kernel's high-water mark of this process
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

def reset():  # let the mark start from what is in use now (Linux)
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass

n, d, batch, k = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
x, q = rng.standard_normal((n, d), dtype=np.float32), rng.standard_normal((batch, d), dtype=np.float32)
lutra.scan.knn(q[:2], x[:100], k)  # threads and libraries are there before the mark is set
reset()
before = peak()
result = lutra.scan.knn(q, x, k)
print(max(0, peak() - before - result.scores.nbytes - result.ids.nbytes))
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


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


def peak_growth(function: Callable[[], Any]) -> int:
    """Bytes that this process grows by, at the peak, while a function runs (Linux).

    Memory that was freed before is first given back to the system: taken again, it would not be seen. The
    figure is the kernel's own high-water mark, which misses nothing between two looks.

    Raises
    ------
    OSError
        The system keeps no such mark that can be set back.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = function()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)
