"""sparsemax: the projection of scores onto the probability simplex."""

from __future__ import annotations

import numpy as np


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """Sparse probabilities: the point of the simplex nearest to each row of scores.

    ``p_i = max(z_i - tau, 0)``, with tau such that they sum to 1. Exact: the support is found from the sorted
    scores, as the largest k with ``1 + k z_(k) > z_(1) + ... + z_(k)``.

    Parameters
    ----------
    scores : ndarray, shape (..., n), floating point, n >= 1
        Finite, or -inf for what must get 0 (not all of a row).

    Returns
    -------
    ndarray, the shape and type of scores

    Raises
    ------
    TypeError, ValueError
        No floating point array; n = 0; NaN, +inf, or a row of -inf only.

    Notes
    -----
    Computed in float64. Cost: one sort a row.

    References
    ----------
    Martins and Astudillo, From Softmax to Sparsemax, ICML 2016, arXiv 1602.02068.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.vocab.sparsemax(np.array([0.5, 0.3, -1.0])).round(6).tolist()
    [0.6, 0.4, 0.0]
    """
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f":
        raise TypeError("scores must be a NumPy array of a floating point type")
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores has shape {scores.shape}; a row needs at least one score")
    if scores.size == 0:
        return scores.copy()
    top = scores.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise ValueError("scores hold NaN or +inf, or a row of -inf only")
    shifted = scores.astype(np.float64) - top
    ordered = -np.sort(-shifted, -1)
    return np.maximum(shifted - threshold(ordered), 0).astype(scores.dtype)


def threshold(ordered: np.ndarray) -> np.ndarray:
    """tau of rows sorted from the largest, float64, (..., n) to (..., 1)."""
    sums = np.cumsum(ordered, -1)
    k = np.arange(1, ordered.shape[-1] + 1)
    with np.errstate(invalid="ignore"):  # -inf - -inf
        inside = 1 + k * ordered > sums
    support = inside.sum(-1, keepdims=True)  # a prefix
    return (np.take_along_axis(sums, support - 1, -1) - 1) / support
