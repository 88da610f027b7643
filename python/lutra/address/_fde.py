"""fde: MUVERA's fixed dimensional encodings of sets of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import F32, F64, I32, I64, Kind, call
from ..reference import fde as reference
from ._fde_encoder import FDE, BlockRows, encoder_of, packed_of, tables_of
from ._ragged import check_finite, odd_row, ragged


def _options(e: FDE) -> tuple[Any, ...]:
    return e.d, e.repetitions, e.k_sim, e.d_proj, e.projection, e.fill_empty, e.final_dim, e.seed


def fde(tokens: Any, ptr: Any, encoder: FDE, *, query: bool = False, sparse: bool = False) -> Any:
    """Encode sets of vectors as single vectors: MUVERA's fixed dimensional encodings.

    Parameters
    ----------
    tokens : array, shape (n, d), float32, float16, bfloat16 or float64
        The vectors of all documents (or queries), one document after another.
    ptr : array, shape (documents + 1,), int64
        Document ``i`` has the rows ``ptr[i] : ptr[i + 1]``; from 0 to ``n``.
    encoder : FDE
    query : bool, default False
        Sums in place of means, and empty blocks stay zero.
    sparse : bool, default False
        Only the blocks that have tokens (queries, encoders without ``final_dim``).

    Returns
    -------
    array, shape (documents, encoder.dim), float32 (float64 for float64 tokens)
        A document without tokens is zeros. With ``sparse``, `BlockRows`.

    Raises
    ------
    TypeError
        Another dtype, arrays of two libraries, or an encoder that is none.
    ValueError
        Another width than the encoder's; ``ptr`` that does not begin with 0, falls, or does not end with
        ``n``; NaN or infinity (on CUDA neither is looked for); ``sparse`` where it has no meaning.

    Notes
    -----
    Sums run in a fixed order: the same bits whatever the number of threads. Where a product with a plane is 0
    up to rounding, SIMD levels and backends may choose either of two partitions. Not differentiable.

    Cost: ``2 d repetitions k_sim`` operations a token to partition it, ``d repetitions`` additions a token,
    and ``2 d d_proj`` operations for each block that has tokens, and for each token that fills empty ones.

    On CUDA a kernel encodes ``k_sim`` up to 11 and ``d`` up to 4096; torch's own ops do the rest, and
    ``final_dim``. An encoder's first call on a device copies its arrays there.

    References
    ----------
    See `FDE`.
    """
    if not isinstance(encoder, FDE):
        raise TypeError(f"encoder must be a lutra.address.FDE, got {encoder!r}")
    if sparse:
        if not query:
            raise ValueError("sparse=True needs query=True: the encodings of documents are not sparse")
        if encoder.final_dim is not None:
            raise ValueError(f"sparse=True needs an encoder without final_dim, which is {encoder.final_dim}")
        return BlockRows(*call("fde_blocks", _fde_blocks, (tokens, ptr), _options(encoder)))
    return call("fde", _fde, (tokens, ptr), (*_options(encoder), bool(query)))


def _fde(
    kind: Kind, tokens: Any, ptr: Any, d: int, repetitions: int, k_sim: int, d_proj: int,
    projection: str | None, fill_empty: bool, final_dim: int | None, seed: int, query: bool = False,
) -> Any:  # fmt: skip
    encoder = encoder_of(d, repetitions, k_sim, d_proj, projection, fill_empty, final_dim, seed)
    code = ragged(kind, tokens, ptr, d)
    if _on_device(kind, code, encoder):
        out = _dense_on_device(kind, tokens, ptr, code, encoder, query)
        if final_dim is None:
            return out
        from ..torch_ops.fde import sketched

        return sketched(out, encoder)
    if kind.cuda and kind.name == "torch":
        from ..torch_ops.fde import compose

        return compose(tokens, ptr, encoder, query)
    if kind.cuda or kind.kernels is None or code == F64:
        host = kind.to_numpy(tokens)
        check_finite(host)
        planes, psi, scale, final = tables_of(encoder)
        result = reference.fde(
            host, kind.to_numpy(ptr), planes, psi, scale, query=query, fill_empty=fill_empty, final=final
        )
        return kind.from_numpy(result, F64 if code == F64 else F32, tokens)
    tokens, ptr = kind.dense(tokens), kind.dense(ptr)
    out = kind.empty((ptr.shape[0] - 1, encoder.dim), F32, tokens)
    _run(kind, tokens, ptr, code, encoder, query, kind.ptr(out))
    return out


# ---------------------------------------------------------------- CUDA
_MOST_BITS_CUDA, _MOST_D_CUDA = 11, 4096  # of the kernel: what shared memory holds
_tables_on_device: dict[Any, tuple[Any, Any]] = {}


def _on_device(kind: Kind, code: int, e: FDE) -> bool:
    """Whether the CUDA kernel encodes this; the final sketch follows in torch's own ops."""
    return (
        kind.cuda and kind.kernels is not None and code != F64 and e.k_sim <= _MOST_BITS_CUDA
        and e.d <= _MOST_D_CUDA and (e.final_dim is None or kind.name == "torch")
    )  # fmt: skip


def _dense_on_device(kind: Kind, tokens: Any, ptr: Any, code: int, e: FDE, query: bool) -> Any:
    packed = packed_of(e)
    key = e, kind.name, str(tokens.device)
    if key not in _tables_on_device:
        while len(_tables_on_device) >= 8:
            _tables_on_device.pop(next(iter(_tables_on_device)))
        psi = None if packed.psi is None else kind.from_numpy(packed.psi, F32, tokens)
        _tables_on_device[key] = kind.from_numpy(packed.planes, F32, tokens), psi
    planes, psi = _tables_on_device[key]
    tokens, ptr = kind.dense(tokens), kind.dense(ptr)
    documents = ptr.shape[0] - 1
    out = kind.empty((documents, e.num_blocks * e.width), F32, tokens)
    scratch = kind.scratch("fde", tokens, tokens.shape[0], e.repetitions)
    kind.kernels.fde(
        kind.ptr(tokens), code, *tokens.shape, kind.ptr(ptr), documents, kind.ptr(planes), e.repetitions,
        e.k_sim, None if psi is None else kind.ptr(psi), e.width, packed.ld_psi, packed.scale, query,
        e.fill_empty, kind.ptr(out), *kind.launch(tokens, scratch),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- the CPU
def _run(kind, tokens, ptr, code, encoder, query, out, partitions=None, sparse=(None, None, None, 0)) -> None:
    packed = packed_of(encoder)
    bad = kind.kernels.fde(
        kind.ptr(tokens), code, *tokens.shape, kind.ptr(ptr), ptr.shape[0] - 1, packed.planes,
        encoder.repetitions, encoder.k_sim, packed.psi, encoder.width, packed.ld_psi, packed.scale, query,
        encoder.fill_empty, packed.final_map, encoder.final_dim or 0, out, partitions, *sparse,
    )  # fmt: skip
    if bad != -1:
        raise odd_row(bad)


def _fde_blocks(
    kind: Kind, tokens: Any, ptr: Any, d: int, repetitions: int, k_sim: int, d_proj: int,
    projection: str | None, fill_empty: bool, final_dim: int | None, seed: int,
) -> Any:  # fmt: skip
    encoder = encoder_of(d, repetitions, k_sim, d_proj, projection, fill_empty, final_dim, seed)
    code = ragged(kind, tokens, ptr, d)
    if kind.cuda and kind.name == "torch":
        from ..torch_ops import fde as composed

        if not _on_device(kind, code, encoder):
            return composed.compose_blocks(tokens, ptr, encoder)
        return composed.occupied(
            _dense_on_device(kind, tokens, ptr, code, encoder, True), tokens, ptr, encoder
        )
    if kind.cuda or kind.kernels is None or code == F64:
        host = kind.to_numpy(tokens)
        check_finite(host)
        rows, blocks, values = reference.fde_blocks(host, kind.to_numpy(ptr), *tables_of(encoder)[:3])
        return (
            kind.from_numpy(rows, I64, tokens),
            kind.from_numpy(blocks, I32, tokens),
            kind.from_numpy(values, F64 if code == F64 else F32, tokens),
        )
    tokens, ptr = kind.dense(tokens), kind.dense(ptr)
    queries = ptr.shape[0] - 1
    partitions = np.empty((tokens.shape[0], repetitions), np.int32)
    bad = kind.kernels.simhash(
        kind.ptr(tokens), code, *tokens.shape, packed_of(encoder).planes, repetitions, k_sim, partitions
    )
    if bad != -1:
        raise odd_row(bad)
    rows = np.zeros(queries + 1, np.int64)
    kind.kernels.fde_count(
        partitions, partitions.shape[0], kind.ptr(ptr), queries, repetitions, k_sim, rows[1:]
    )
    np.cumsum(rows, out=rows)
    found = int(rows[-1])
    blocks = kind.empty((found,), I32, tokens)
    values = kind.empty((found, encoder.width), F32, tokens)
    sparse = (rows, kind.ptr(blocks), kind.ptr(values), found)
    _run(kind, tokens, ptr, code, encoder, True, None, partitions, sparse)
    return kind.from_numpy(rows, I64, tokens), blocks, values
