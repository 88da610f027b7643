"""product_keys: the best of n * n keys, each a pair of two sub-keys."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import F32, F64, FLOATS, I64, Kind, call
from ..reference import address as reference

_tuple = tuple.__new__
#: Ids are below 2^32 while they are selected.
MAX_SUB_KEYS = 65535


class ProductKeys(NamedTuple):
    """Result of `product_keys`."""

    scores: Any
    ids: Any


def product_keys(queries: Any, keys: Any, k: int) -> ProductKeys:
    """The k of n * n product keys with the largest inner products with each query.

    A product key is a pair of sub-keys, one of each of two sets of n; the key of the sub-keys i and j has the
    number ``i * n + j``. The first half of a query is scored with the first set, the second half with the
    second, and the score of a key is the sum. So 2 n inner products and k log k sums find the best of n * n.

    Parameters
    ----------
    queries : array, shape (..., d), or (..., heads, d), float32, float16, bfloat16 or float64
        d is even.
    keys : array, shape (2, n, d / 2), or (heads, 2, n, d / 2)
        The two sets, n <= 65535; with 4 axes each head has sets of its own. Half precision may be mixed with
        float32; float64 goes with float64.
    k : int
        At most n.

    Returns
    -------
    scores : array, shape (..., k) or (..., heads, k), float32 (float64 for float64)
        Best first.
    ids : array, the same shape, int64
        In [0, n * n). Sub-keys with equal scores are taken in the order of their numbers, equal sums in the
        order of their ids.

    Raises
    ------
    TypeError
        A wrong type or dtype, or arrays of different libraries.
    ValueError
        A shape or k that does not fit; a NaN score (its query is named; on CUDA it is not looked for).

    Notes
    -----
    Sums are float32. Scores of sub-keys stay in the cache, nothing of size n is written; and of the k * k
    sums only those are made that can be among the best: of the ranks a and b, counted from 1, those with
    ``a * b <= k``. Cost: 2 n d operations a query; for few queries one read of the keys. Queries of a large
    call are summed in another order than those of a small one (from 40 on), so their scores may differ in the
    last bits. float64 is computed by the reference.

    On CUDA the products with the sub-keys are those of the arrays' library (cuBLAS: float32 in TF32 only
    where torch is told so), and the selection is a kernel's: k to 2048 (less where shared memory is small);
    other k and float64 with torch's own ops, which give equal scores in any order.

    Gradient (torch): of the scores, to queries and keys through the chosen entries.

    References
    ----------
    Lample et al., Large Memory Layers with Product Keys, NeurIPS 2019, arXiv 1907.05242.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> keys = np.array([[[1.], [2.], [4.]], [[0.], [3.], [1.]]], np.float32)
    >>> lutra.address.product_keys(np.ones((1, 2), np.float32), keys, 3)
    ProductKeys(scores=array([[7., 5., 5.]], dtype=float32), ids=array([[7, 4, 8]]))
    """
    return _tuple(ProductKeys, call("product_keys", _product_keys, (queries, keys), (k,)))


def _shape(queries: Any, keys: Any, k: int) -> tuple[tuple[int, ...], int, int, int]:
    """Checks that need no data; leading axes, heads, n and d / 2."""
    k = _checks.integer("k", k, 1)
    given, q = tuple(keys.shape), tuple(queries.shape)
    if len(given) not in (3, 4) or given[-3] != 2:
        raise ValueError(f"keys has shape {given}; it must be (2, n, d / 2) or (heads, 2, n, d / 2)")
    *_, n, half = given
    heads = given[0] if len(given) == 4 else 1
    want = (heads, 2 * half) if len(given) == 4 else (2 * half,)
    if q[len(q) - len(want) :] != want or len(q) < len(want):
        text = ", ".join(map(str, want))
        raise ValueError(f"queries has shape {q}; for keys of shape {given} it must be (..., {text})")
    if k > n:
        raise ValueError(f"k is {k}; it must be at most n, of which keys has {n}")
    if n > MAX_SUB_KEYS:
        raise ValueError(f"keys has n = {n} sub-keys; at most {MAX_SUB_KEYS} are possible")
    return q[:-1], heads, n, half


def _types(kind: Kind, queries: Any, keys: Any) -> tuple[int, int]:
    _checks.same_kind(kind, keys, "keys", queries, "queries")
    of_queries = _checks.dtype(kind, queries, "queries", (*FLOATS, F64))
    of_keys = _checks.dtype(kind, keys, "keys", (*FLOATS, F64))
    if (of_queries == F64) != (of_keys == F64):
        raise TypeError(
            f"queries has dtype {_dtype(queries)}, keys has {_dtype(keys)}; float64 goes with float64 only"
        )
    return of_queries, of_keys


def _dtype(a: Any) -> str:
    return str(a.dtype).removeprefix("torch.")


def _product_keys(kind: Kind, queries: Any, keys: Any, k: int) -> tuple[Any, Any]:
    q_code, key_code = _types(kind, queries, keys)
    lead, heads, n, half = _shape(queries, keys, k)
    if kind.cuda and kind.kernels is not None and q_code != F64 and _selects(kind, queries, k):
        return _on_cuda(kind, queries, keys, k, lead, heads, n, half)
    if kind.cuda:
        if kind.name != "torch":
            raise NotImplementedError("product_keys of CuPy arrays takes float32 and float16, and k <= 2048")
        from ..torch_ops.product_keys import compose

        return compose(queries, keys, k)
    if kind.kernels is None or q_code == F64:
        scores, ids = reference.product_keys(kind.to_numpy(queries), kind.to_numpy(keys), k)
        code = F64 if q_code == F64 else F32
        return kind.from_numpy(scores, code, queries), kind.from_numpy(ids, I64, queries)
    queries, keys = kind.dense(queries), kind.dense(keys)
    scores, ids = kind.empty((*lead, k), F32, queries), kind.empty((*lead, k), I64, queries)
    bad = kind.kernels.product_keys(
        kind.ptr(queries), q_code, kind.ptr(keys), key_code, prod(lead) // max(heads, 1), heads, n, half, k,
        kind.ptr(scores), kind.ptr(ids),
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(reference.product_message(np.unravel_index(bad, lead) if lead else ()))
    return scores, ids


# ---------------------------------------------------------------- on CUDA
_HELD = 1 << 28  # products of sub-keys that are held at once


def _selects(kind: Kind, like: Any, k: int) -> bool:
    return k <= 256 or k <= kind.kernels.product_select_most(*kind.launch(like))


def _products(kind: Any, queries: Any, keys: Any) -> Any:
    """(heads * 2, tokens, n) float32, of (tokens, heads * 2, half) and (heads * 2, n, half)."""
    if kind.name == "torch":
        a, b = queries.transpose(0, 1), keys.transpose(1, 2)
        if a.dtype == b.dtype and a.dtype != kind.torch.float32:
            return kind.torch.bmm(a, b, out_dtype=kind.torch.float32)
        return kind.torch.bmm(a.float(), b.float())
    with queries.device:
        a, b = (x.astype(np.float32, copy=False) for x in (queries, keys))
        return kind.cupy.ascontiguousarray(kind.cupy.matmul(a.transpose(1, 0, 2), b.transpose(0, 2, 1)))


def _on_cuda(
    kind: Kind, queries: Any, keys: Any, k: int, lead: tuple[int, ...], heads: int, n: int, half: int
) -> tuple[Any, Any]:
    scores, ids = kind.empty((*lead, k), F32, queries), kind.empty((*lead, k), I64, queries)
    tokens = prod(lead) // max(heads, 1)
    queries, keys = queries.reshape(tokens, 2 * heads, half), keys.reshape(2 * heads, n, half)
    flat_scores, flat_ids = scores.reshape(tokens, heads * k), ids.reshape(tokens, heads * k)
    step = max(1, _HELD // max(1, 2 * heads * n))
    for first in range(0, tokens if heads else 0, step):
        last = min(first + step, tokens)
        products = _products(kind, queries[first:last], keys)
        kind.kernels.product_select(
            kind.ptr(products), last - first, heads, n, k, kind.ptr(flat_scores[first:last]),
            kind.ptr(flat_ids[first:last]), *kind.launch(queries),
        )  # fmt: skip
    return scores, ids
