"""Loads the compiled modules once, remembers why one failed, and picks a backend for a device.

Environment
-----------
LUTRA_BACKEND : ``auto`` (default), ``cpu`` (an error where the CPU module is missing) or ``reference``
    (NumPy only: slow, but the definition of every op).
LUTRA_SIMD : ``portable``, ``avx2`` or ``avx512``; the default is the highest that the machine has.
LUTRA_NUM_THREADS : number of threads of the CPU kernels; the default follows OpenMP and torch.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

_CHOICE = os.environ.get("LUTRA_BACKEND", "auto").strip().lower() or "auto"
if _CHOICE not in ("auto", "cpu", "reference"):
    raise ImportError(f"LUTRA_BACKEND is {_CHOICE!r}; it must be 'auto', 'cpu' or 'reference'")


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    if _CHOICE == "reference":
        return None, "LUTRA_BACKEND=reference"
    try:
        return importlib.import_module(f"lutra.{name}"), None
    except ModuleNotFoundError:
        return None, f"lutra.{name} was not built"
    except ImportError as error:
        return None, str(error)


#: The CPU module or None, and why it is missing.
core, core_error = _load("_core")
if _CHOICE == "cpu" and core is None:
    raise ImportError(f"LUTRA_BACKEND=cpu, but the CPU module cannot be used: {core_error}")
#: The CUDA module or None, and why it is missing. Loading it needs no driver.
cuda, cuda_error = _load("_cuda")

if core is not None and (_level := os.environ.get("LUTRA_SIMD", "").strip()):
    try:
        core.set_simd_level(_level)
    except ValueError as error:
        raise ImportError(f"LUTRA_SIMD: {error}") from None
if core is not None and (_threads := os.environ.get("LUTRA_NUM_THREADS", "").strip()):
    if not _threads.isdigit() or int(_threads) < 1:
        raise ImportError(f"LUTRA_NUM_THREADS is {_threads!r}; it must be a positive integer")
    core.set_num_threads(int(_threads))


def cuda_status() -> tuple[bool, str]:
    """Whether CUDA kernels can run here, and why not (or on which device)."""
    if cuda is None:
        return False, cuda_error or "not built"
    count, message = cuda.device_count()
    if count == 0:
        return False, message or "no CUDA device"
    return True, cuda.device_name(0)


def simd_level() -> str:
    """SIMD level in use: ``'avx512'``, ``'avx2'``, ``'portable'``, or ``'none'`` on the reference."""
    return "none" if core is None else core.simd_level()


def get_num_threads() -> int:
    """Number of threads that the CPU kernels use (1 on the reference)."""
    return 1 if core is None else core.num_threads()


def set_num_threads(n: int) -> None:
    """Set the number of threads of the CPU kernels.

    Parameters
    ----------
    n : int
        At least 1; 0 follows OpenMP again (``OMP_NUM_THREADS``, ``torch.set_num_threads``).
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n!r}")
    if core is not None:
        core.set_num_threads(n)
