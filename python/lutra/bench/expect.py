"""Is a result right? Each function raises AssertionError with the first difference."""

from __future__ import annotations

from typing import Any

import numpy as np


def close(got: Any, want: Any, rtol: float = 1e-4, atol: float = 1e-5, what: str = "result") -> None:
    """Equal shapes and close values (arrays of any library that NumPy or ``.float()`` can read)."""
    got, want = as_numpy(got), as_numpy(want)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=what)


def equal(got: Any, want: Any, what: str = "result") -> None:
    """Equal shapes and values."""
    np.testing.assert_array_equal(as_numpy(got), as_numpy(want), err_msg=what)


def as_numpy(a: Any) -> np.ndarray:
    """A NumPy array of an array or tensor (bfloat16 as float32)."""
    if hasattr(a, "detach"):
        a = a.detach()
        a = a.to_dense() if a.is_sparse else a
        a = (a.float() if a.is_floating_point() and a.element_size() == 2 else a).cpu().numpy()
    return np.asarray(a)


def neighbours(
    got: Any,
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    metric: str,
    most: int = 4,
) -> None:
    """The k best of each query, against scores in float64.

    Looks at ``most`` queries, spread over all. Scores must be the k best ones and the true ones of their ids;
    ids may differ only where true scores differ by less than rounding.
    """
    scores, ids = as_numpy(got[0]), as_numpy(got[1])
    assert scores.shape == ids.shape == (len(queries), k), f"shapes {scores.shape}, {ids.shape}"
    sign = -1 if metric == "l2" else 1
    for i in np.unique(np.linspace(0, len(queries) - 1, most).astype(int)):
        q = queries[i].astype(np.float64)
        truth = np.empty(len(database))
        for start in range(0, len(database), 1 << 16):
            rows = database[start : start + (1 << 16)].astype(np.float64)
            truth[start : start + (1 << 16)] = ((rows - q) ** 2).sum(1) if metric == "l2" else rows @ q
        best = sign * np.sort(sign * truth)[::-1][:k]
        close(scores[i], best, rtol=1e-4, what=f"scores of query {i}")
        assert len(set(ids[i])) == k, f"query {i}: an id appears twice in {ids[i]}"
        close(truth[ids[i]], scores[i], rtol=1e-4, what=f"scores of query {i} against their ids")
