"""Tables, ids and bags for the tests of lutra.gather on CUDA."""

from __future__ import annotations

import numpy as np
from gpu_arrays import FLOATS, rounded

DTYPES = (*FLOATS, "uint8", "int8")
MODES = ("sum", "mean", "max")


def make_table(rows, dim, dtype, seed=0):
    """(what the kernel gets, what the reference gets, scale, minimum)."""
    rng = np.random.default_rng(seed)
    if dtype in ("uint8", "int8"):
        low = np.iinfo(dtype).min
        codes = rng.integers(low, low + 256, (rows, dim)).astype(dtype)
        return codes, codes, rng.random(rows, np.float32) + 0.1, -rng.random(rows, np.float32)
    table = rounded(rng.standard_normal((rows, dim)).astype(np.float32), dtype)
    return table, table, None, None


def make_ids(rows, layout, dtype="int64", seed=0, longest=9):
    """Ids with repetitions and empty bags: (ids, offsets, include_last_offset)."""
    rng = np.random.default_rng(seed)
    if layout == "fixed":
        return rng.integers(0, rows, (23, 5)).astype(dtype), None, False
    length = rng.integers(0, longest, 40)
    length[[0, 7, 8, -1]] = 0
    length[3] = 61
    ids = rng.integers(0, rows, length.sum()).astype(dtype)
    last = layout == "last"
    return ids, np.concatenate([[0], np.cumsum(length)])[: None if last else -1].astype(dtype), last


def put_all(gpu, dtype, table, scale, minimum):
    on_gpu = gpu.put(table, dtype)
    return on_gpu, {} if scale is None else {"scale": gpu.put(scale), "minimum": gpu.put(minimum)}
