"""random_rows: rows of normal values computed from a counter."""

from __future__ import annotations

from math import isfinite, prod
from typing import Any

from .. import _checks
from .._arrays import BF16, F16, F32, F64, I32, I64, Kind, call
from ..reference import address as reference

OUTPUTS = {"normal": 0, "words": 1}
DTYPES = {"float32": F32, "float16": F16, "bfloat16": BF16, "float64": F64}


def random_rows(
    ids: Any,
    dim: int,
    sequences: Any = None,
    *,
    seed: int = 0,
    scale: float = 1.0,
    dtype: str = "float32",
    output: str = "normal",
) -> Any:
    """Random rows of tokens, computed from a counter: no table is stored.

    The row of a token is N(0, scale^2 I), a function of (seed, sequence, token, dimension) alone: the same
    token gives the same row within a sequence, and an independent one in another sequence.

    Parameters
    ----------
    ids : array, shape (...), int32 or int64
        Tokens, in [0, 2^32).
    dim : int
        Values of a row.
    sequences : array, int64 or int32, optional
        The sequence that each token belongs to; its shape is a leading part of that of ids: (batch,) for ids
        (batch, length), or all of it. Any integer is a key. Without it every token belongs to sequence 0, and
        the rows are those of a fixed random table.
    seed : int, default 0
        Taken modulo 2^64.
    scale : float, default 1.0
        Standard deviation.
    dtype : {'float32', 'float16', 'bfloat16', 'float64'}, default 'float32'
        Of the result; the same values, rounded.
    output : {'normal', 'words'}, default 'normal'
        ``'words'`` gives the generator's integers, as int32.

    Returns
    -------
    array, shape (..., dim)

    Raises
    ------
    IndexError
        A token outside [0, 2^32).
    TypeError, ValueError
        A wrong type, shape or option.

    Notes
    -----
    Philox4x32-10, keyed by the seed, on the counter (block, token, sequence); the transform of Box and
    Muller. csrc/address/random_rows.h has it to the bit. Integers are equal everywhere; normals are within
    2e-6 (times scale) of the formula, and differ in the last bits between SIMD levels and CUDA. On CUDA
    tokens are not checked: the row of one out of range is NaN (words: -1); float64 is computed with torch's
    own ops. Cost: no memory but the result; about 2 cycles a value with AVX-512.

    References
    ----------
    Huang, Zelikman, Chen, Wu, Valiant and Liang, Lexinvariant Language Models, 2023, arXiv 2305.16349.
    Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> ids = np.array([[5, 7, 5], [5, 7, 5]])
    >>> rows = lutra.address.random_rows(ids, 64, np.array([0, 1]), seed=3)
    >>> bool((rows[0, 0] == rows[0, 2]).all()), bool((rows[0, 0] == rows[1, 0]).any())
    (True, False)
    """
    dim = _checks.integer("dim", dim, 0)
    seed = signed(_checks.integer("seed", seed))
    options = (dim, seed, scale, dtype, output)
    return call("random_rows", _random_rows, (ids, sequences), options)


def signed(seed: int) -> int:
    """A seed modulo 2^64 as an int64, which is what torch's dispatcher takes."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _result(ids: Any, sequences: Any, scale: Any, dtype: str, output: str) -> int:
    """Checks that need no data; the dtype code of the result."""
    _checks.choice("output", output, OUTPUTS)
    code = _checks.choice("dtype", dtype, DTYPES)
    try:
        fine = isfinite(float(scale))
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a number, got {scale!r}") from None
    if not fine:
        raise ValueError(f"scale must be finite, got {scale!r}")
    if sequences is not None and tuple(sequences.shape) != tuple(ids.shape[: len(sequences.shape)]):
        raise ValueError(
            f"sequences has shape {tuple(sequences.shape)}; it must be a leading part of that of ids, "
            f"{tuple(ids.shape)}"
        )
    return I32 if output == "words" else code


def _random_rows(
    kind: Kind,
    ids: Any,
    sequences: Any = None,
    dim: int = 1,
    seed: int = 0,
    scale: float = 1.0,
    dtype: str = "float32",
    output: str = "normal",
) -> Any:
    code = _result(ids, sequences, scale, dtype, output)
    id_code = _checks.dtype(kind, ids, "ids", (I32, I64))
    if sequences is not None:
        _checks.same_kind(kind, sequences, "sequences", ids, "ids")
        if _checks.dtype(kind, sequences, "sequences", (I32, I64)) != I64:
            sequences = kind.cast(sequences, I64)
    if kind.cuda and kind.kernels is not None and code != F64:
        ids = kind.dense(ids)
        n = prod(ids.shape)
        of = None if sequences is None else kind.dense(sequences)
        out = kind.empty((*ids.shape, dim), code, ids)
        kind.kernels.random_rows(
            kind.ptr(ids), id_code, n, None if of is None else kind.ptr(of),
            1 if of is None else max(1, n // max(1, prod(of.shape))), dim, seed % (1 << 64), OUTPUTS[output],
            float(scale), kind.ptr(out), code, *kind.launch(ids),
        )  # fmt: skip
        return out
    if kind.cuda:
        if kind.name != "torch":
            raise NotImplementedError("random_rows of CuPy arrays gives no float64; torch tensors do")
        from ..torch_ops.random_rows import compose

        return compose(ids, sequences, dim, seed, scale, dtype, output)
    if kind.kernels is None or code == F64:
        values = reference.random_rows(
            kind.to_numpy(ids), dim, None if sequences is None else kind.to_numpy(sequences),
            seed=seed, scale=scale, dtype="float64" if code == F64 else "float32", output=output,
        )  # fmt: skip
        return kind.from_numpy(values, code, ids)
    ids = kind.dense(ids)
    sequences = None if sequences is None else kind.dense(sequences)
    out = kind.empty((*ids.shape, dim), code, ids)
    bad = kind.kernels.random_rows(
        kind.ptr(ids), id_code, prod(ids.shape), None if sequences is None else kind.ptr(sequences),
        0 if sequences is None else prod(sequences.shape), dim, seed % (1 << 64), OUTPUTS[output],
        float(scale), kind.ptr(out), code,
    )  # fmt: skip
    if bad != -1:
        reference.check_tokens(kind.to_numpy(ids))
        raise IndexError("ids changed while the kernel ran")
    return out
