"""pool_tokens: fewer token vectors for each document, by the means of clusters of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, gather
from .._arrays import BF16, F16, F32, F64, kind_of
from ._home import HOST, adopt, deliver, to_float32
from ._progress import Progress
from ._tokens import as_tokens

_PART = 1 << 16  # tokens, about, whose means are taken at a time


def pool_tokens(
    tokens: Any, ptr: Any, factor: float, *, protect: int = 0, normalize: bool = True,
    progress: bool | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Pool the tokens of each document to the means of ceil(n / factor) clusters.

    Parameters
    ----------
    tokens : array, shape (n, d), float32, float16, bfloat16, float64, int8 or uint8
        Tokens of all documents, see `as_tokens`.
    ptr : array, shape (documents + 1,), int64
    factor : int or float
        At least 1; how many tokens become one. 2 to 4 are common.
    protect : int, default 0
        So many tokens at the beginning of a document stay as they are ([CLS] and markers), and do not count.
    normalize : bool, default True
        Give each mean the mean norm of its tokens: means of unit vectors are unit vectors again. False: the
        plain means of the paper's code, which are the shorter the more their tokens differ.
    progress : bool or None
        A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

    Returns
    -------
    tokens : array, shape (m, d), the dtype of ``tokens``; float32 for integers
        The clusters of a document in the order of their first tokens.
    ptr : array, shape (documents + 1,), int64

    Raises
    ------
    ImportError
        scipy is not installed.
    TypeError, ValueError
        Arrays that do not fit together, NaN or infinities (the row is named), a factor below 1.

    Notes
    -----
    Clusters are those of Ward's method on the directions of a document's tokens, whose squared distances are
    2 - 2 cos; pylate gives Ward's method 1 - cos as if those were distances. Cost: n^2 distances and steps
    for a document of n tokens, on one thread. Queries are left as they are.

    References
    ----------
    Clavié, Chaffin, Adams, Reducing the footprint of multi-vector retrieval with minimal performance impact
    via token pooling, 2024, arXiv 2409.14683.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> tokens = np.array([[1, 0], [0, 1], [0.9, 0.1], [0, 1]], np.float32)
    >>> lutra.index.pool_tokens(tokens, [0, 4], 2)[0]
    array([[0.9514..., 0.0500...],
           [0.    ..., 1.    ...]], dtype=float32)
    """
    protect = _checks.integer("protect", protect, 0)
    factor = _checks.positive("factor", factor)
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor:g}")
    try:
        from scipy.cluster.hierarchy import linkage
    except ImportError:
        raise ImportError("pool_tokens clusters with scipy: pip install scipy") from None
    tokens, ptr = as_tokens((tokens, ptr))
    like, native = tokens, adopt(tokens, "tokens")
    host, starts = HOST.bring(native), np.asarray(HOST.bring(ptr))
    lengths = np.diff(starts)
    free = np.maximum(lengths - protect, 0)
    kept = np.minimum(lengths, protect) + np.ceil(free / factor).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(kept)])
    pooled = np.empty((int(ends[-1]), host.shape[1]), np.float32)
    with Progress(len(lengths), "pool tokens", progress) as bar:
        i = 0
        while i < len(lengths):
            j = max(i + 1, int(np.searchsorted(starts, starts[i] + _PART, side="right")) - 1)
            x = HOST.kind.dense(to_float32(HOST, host[starts[i] : starts[j]], "tokens", int(starts[i])))
            unit = HOST.normalise(x).astype(np.float64)
            labels = np.empty(len(x), np.int64)
            for doc in range(i, j):
                low, high = starts[doc] - starts[i], starts[doc + 1] - starts[i]
                fixed = min(protect, int(high - low))
                labels[low : low + fixed] = ends[doc] - ends[i] + np.arange(fixed)
                inside = unit[low + fixed : high]
                count = int(kept[doc]) - fixed
                labels[low + fixed : high] = ends[doc] - ends[i] + fixed + _ward(linkage, inside, count)
                bar.tick()
            order = np.argsort(labels, kind="stable")
            first = np.searchsorted(labels[order], np.arange(ends[j] - ends[i]))
            means = gather.bag(x, order, first, mode="mean")
            if normalize and len(first):
                norms = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))[order]
                norms = np.add.reduceat(norms, first) / np.diff(first, append=len(x))
                means = HOST.normalise(means) * norms[:, None].astype(np.float32)
            pooled[ends[i] : ends[j]] = means
            i = j
    pooled, ends = deliver(HOST, (pooled, ends), like)
    code = kind_of(native, "tokens").code(native)
    return kind_of(pooled, "tokens").cast(pooled, code if code in (F16, BF16, F64) else F32), ends


def _ward(linkage: Any, unit: np.ndarray, count: int) -> np.ndarray:
    """Numbers of ``count`` clusters of the rows, in the order of their first rows."""
    n = len(unit)
    if count == n:
        return np.arange(n)
    merges = n - count  # scipy gives them by rising distance: the first so many leave ``count`` clusters
    pairs = linkage(unit, "ward")[:merges, :2].astype(np.int64)
    root = np.arange(n + merges)
    root[pairs[:, 0]] = root[pairs[:, 1]] = n + np.arange(merges)
    while True:
        above = root[root]
        if (above == root).all():
            break
        root = above
    _, first, inverse = np.unique(root[:n], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse.reshape(-1)]
