"""Microbenchmarks: the cases behind ``lutra bench`` and ``benchmarks/``.

A `Case` builds its input, checks lutra's result against an independent one and only then is timed, in turns
with its peers (NumPy, torch, FAISS: those that are installed), so that all of them see the same machine. Its
time is also compared with the machine's own limit (`Limits`), measured in the same run.
"""

from .case import Case, Prepared, all_cases
from .limits import Limits
from .runner import Row, run_case
from .timing import Timing, interleaved

__all__ = ["Case", "Limits", "Prepared", "Row", "Timing", "all_cases", "interleaved", "run_case"]
