"""prune_tokens: fewer token vectors for each document, by leaving some out."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._arrays import is_native, kind_of
from ._home import HOST, adopt, to_float32
from ._progress import Progress
from ._tokens import _home, as_tokens

_PART = 1 << 16  # tokens whose norms are taken at a time
_BY = {"first": 0, "norm": 1, "similarity": 2}


def prune_tokens(
    tokens: Any, ptr: Any, keep: int | float, by: Any = "similarity", *, protect: int = 0,
    progress: bool | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Keep some of each document's tokens.

    Parameters
    ----------
    tokens : array, shape (n, d)
        Tokens of all documents, see `as_tokens`.
    ptr : array, shape (documents + 1,), int64
    keep : int or float
        An int >= 1: so many tokens of each document (all of those with fewer). A float in (0, 1]: that share,
        rounded up.
    by : {'first', 'norm', 'similarity'} or array, shape (n,), default 'similarity'
        - ``'first'``: those at the beginning;
        - ``'norm'``: those of the largest norms;
        - ``'similarity'``: those that resemble the others least: the first token, then again and again the
          one whose largest cosine with the tokens kept so far is smallest;
        - an array: those of the largest weights, such as attention or idf.

        Among equals the first.
    protect : int, default 0
        So many tokens at the beginning of a document are kept in any case; they count.
    progress : bool or None
        A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

    Returns
    -------
    tokens : array, shape (m, d), the dtype of ``tokens``
        In the order that they had.
    ptr : array, shape (documents + 1,), int64

    Raises
    ------
    TypeError, ValueError
        Arrays that do not fit together, NaN in tokens or weights, a ``keep`` that is neither a number of
        tokens nor a share.

    Notes
    -----
    'similarity' is Gonzalez's farthest-first traversal on directions: no token that is left out is farther
    from one that is kept than twice the least that is possible. Cost: n^2 d flops for a document of n tokens.

    References
    ----------
    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985. Lassance et al., Learned token
    pruning in contextualized late interaction over BERT, SIGIR 2022 (first k, idf, attention).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> tokens = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
    >>> lutra.index.prune_tokens(tokens, [0, 3], 2)[0]
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    protect = _checks.integer("protect", protect, 0)
    tokens, ptr = as_tokens((tokens, ptr))
    native = adopt(tokens, "tokens")
    starts = np.asarray(HOST.bring(ptr))
    counts = _counts(keep, np.diff(starts))
    if isinstance(by, str):
        _checks.choice("by", by, _BY)
        if by == "first":
            weights = -np.arange(starts[-1], dtype=np.float64)
        else:
            weights = (_norms if by == "norm" else _farthest)(
                HOST.bring(native), starts, counts, protect, progress
            )
    else:
        weights = _given(by, int(starts[-1]))
    rows = _largest(weights, starts, counts, protect)
    home = _home(kind_of(native, "tokens"), native)
    ends = np.concatenate([[0], np.cumsum(counts)])
    return native[home.positions(rows)], home.positions(ends)


def _counts(keep: Any, lengths: np.ndarray) -> np.ndarray:
    """How many tokens of each document are kept."""
    if isinstance(keep, (float, np.floating)):
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be a share in (0, 1] or a number of tokens (an int), got {keep!r}")
        return np.ceil(lengths * float(keep) - 1e-9).astype(np.int64)
    return np.minimum(lengths, _checks.integer("keep", keep, 1))


def _given(by: Any, n: int) -> np.ndarray:
    if isinstance(by, (list, tuple)):
        by = np.asarray(by)
    if not (is_native(by) or hasattr(by, "__dlpack__")):
        raise TypeError(f"by must be one of {', '.join(map(repr, _BY))} or an array of weights, got {by!r}")
    weights = HOST.bring(adopt(by, "by"))
    if weights.shape != (n,):
        raise ValueError(
            f"by has shape {weights.shape}; there are {n} tokens, and it needs a weight for each"
        )
    if weights.dtype.kind not in "fiub" and weights.dtype.name != "bfloat16":
        raise TypeError(f"by must hold numbers, got dtype {weights.dtype}")
    weights = weights.astype(np.float64)
    if np.isnan(weights).any():
        raise ValueError(f"by[{int(np.isnan(weights).argmax())}] is NaN")
    return weights


def _norms(
    host: np.ndarray, starts: np.ndarray, counts: np.ndarray, protect: int, progress: Any
) -> np.ndarray:
    squares = np.empty(len(host))
    for i in range(0, len(host), _PART):
        x = to_float32(HOST, host[i : i + _PART], "tokens", i)
        squares[i : i + _PART] = np.einsum("ij,ij->i", x, x, dtype=np.float64)
    return squares


def _farthest(
    host: np.ndarray, starts: np.ndarray, counts: np.ndarray, protect: int, progress: Any
) -> np.ndarray:
    """Weights that fall in the order in which the traversal takes tokens; -inf for the others."""
    weights = np.full(len(host), -np.inf)
    with Progress(len(counts), "prune tokens", progress) as bar:
        for low, high, count in zip(starts[:-1].tolist(), starts[1:].tolist(), counts.tolist()):
            if count == high - low:
                weights[low:high] = 0
            elif count:
                unit = HOST.normalise(to_float32(HOST, host[low:high], "tokens", low))
                cosines = unit @ unit.T
                nearest = np.full(high - low, -np.inf, np.float32)
                for step in range(count):
                    i = step if step < max(1, protect) else int(nearest.argmin())
                    weights[low + i] = -step
                    np.maximum(nearest, cosines[i], out=nearest)
                    nearest[i] = np.inf  # never again
            bar.tick()
    return weights


def _largest(weights: np.ndarray, starts: np.ndarray, counts: np.ndarray, protect: int) -> np.ndarray:
    """Rows, rising: of each document ``counts`` rows, the protected ones and those of the largest weights."""
    lengths = np.diff(starts)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(weights)) - np.repeat(starts[:-1], lengths)
    weights = np.where(place < protect, np.inf, weights)
    order = np.lexsort((place, -weights, owner))
    chosen = order[
        place < np.repeat(counts, lengths)
    ]  # documents stay together: places are ranks in ``order``
    chosen.sort()
    return chosen
