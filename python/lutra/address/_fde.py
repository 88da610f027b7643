"""FDE and fde: MUVERA's fixed dimensional encodings of sets of vectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import F32, F64, I32, I64, Kind, call, is_torch
from ..reference import fde as reference
from ._ragged import check_finite, odd_row, ragged

PROJECTIONS: dict[Any, int] = {"signs": 0, "count": 1, None: 2}
MOST_BITS = 16
_MOST_VALUES = (1 << 31) - 1
_LANES = 16  # of the widest vectors: rows of the projections are padded to it


class BlockRows(NamedTuple):
    """Rows of which few blocks are not zero.

    Attributes
    ----------
    ptr : array, shape (n + 1,), int64
        Row ``i`` has the blocks ``ptr[i] : ptr[i + 1]`` of the others.
    blocks : array, shape (ptr[-1],), int32
        Their numbers, rising within a row.
    values : array, shape (ptr[-1], width), float32
    """

    ptr: Any
    blocks: Any
    values: Any

    def dense(self, num_blocks: int) -> Any:
        """The rows in full, shape (n, num_blocks * width)."""
        ptr, blocks, values = self
        n, width = ptr.shape[0] - 1, values.shape[1]
        if is_torch(values):
            import torch

            out = values.new_zeros((n, num_blocks, width))
            row = torch.repeat_interleave(torch.arange(n, device=ptr.device), ptr[1:] - ptr[:-1])
            out[row, blocks.long()] = values
        else:
            out = np.zeros((n, num_blocks, width), values.dtype)
            out[np.repeat(np.arange(n), np.diff(ptr)), blocks] = values
        return out.reshape(n, num_blocks * width)


@dataclass(frozen=True)
class FDE:
    """Parameters of MUVERA's fixed dimensional encodings, and the random numbers that follow from them.

    Each of ``repetitions`` cuts the space into ``2**k_sim`` partitions by the signs of products with
    ``k_sim`` Gaussian vectors (`simhash`). A document's block of a partition is the mean of its vectors
    there, a query's the sum; each block is projected to ``d_proj`` values, and all are laid one after
    another. The inner product of a query's and a document's encoding, divided by ``repetitions``,
    approximates their Chamfer similarity: the sum over the query's vectors of their greatest inner product
    with one of the document.

    Parameters
    ----------
    d : int
        Dimensions of a vector.
    repetitions : int, default 20
    k_sim : int, default 5
        0 to 16. 0: one partition, which holds all.
    d_proj : int, default 16
        Values of a projected block.
    projection : {'signs', 'count', None}, default 'signs'
        ``'signs'``, the paper's: a matrix of +1 and -1 over ``sqrt(d_proj)``. ``'count'``, the published
        C++'s: each input goes to one output, with one sign. None: blocks stay ``d`` wide (``d_proj`` is
        then set to ``d``).
    fill_empty : bool, default True
        A document's empty block takes the document's vector whose bits differ from those of the partition in
        the fewest places, the first one on ties. Queries are never filled.
    final_dim : int, optional
        Reduce the whole encoding to so many values by a count-sketch.
    seed : int, default 0
        In [0, 2^63). The same seed gives the same numbers on every backend and platform.

    Attributes
    ----------
    num_blocks : int
        ``repetitions * 2**k_sim``.
    width : int
        Values of a block: ``d_proj``.
    dim : int
        Values of an encoding: ``final_dim``, or ``num_blocks * width``.
    planes : array, shape (repetitions, d, k_sim), float32
    signs : array, int8, or None
        Shape (repetitions, d, d_proj) for ``'signs'``; (repetitions, d) for ``'count'``, one an input.
    columns : array, shape (repetitions, d), int32, or None
        ``'count'`` only: the output that each input goes to.

    Notes
    -----
    The distance between partitions is counted on the bits of the sketch, as in the paper and in the
    published C++, not on those of the partition's number, which are another code of them.

    What agrees with the published C++ (google/graph-mining, fixed_dimensional_encoding.cc), given the same
    random numbers: partitions and their order, sums, means, filled blocks with their ties, the projections
    None and ``'count'``, the final count-sketch, and the order of blocks. Its random numbers come from
    std::mt19937 through the distributions of a C++ library, which differ between libraries, so its encodings
    cannot be had from a seed here. An empty document is an encoding of zeros here; there it is undefined.
    ``'signs'`` is in the paper only.

    References
    ----------
    Dhulipala, Hadian, Jayaram, Lee and Mirrokni, MUVERA: Multi-Vector Retrieval via Fixed Dimensional
    Encodings, NeurIPS 2024, arXiv 2405.19504.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> encoder = lutra.address.FDE(128, repetitions=10, k_sim=3, d_proj=8)
    >>> tokens = np.random.default_rng(0).normal(size=(50, 128)).astype(np.float32)
    >>> encoder.encode_documents(tokens, np.array([0, 20, 50])).shape
    (2, 640)
    """

    d: int
    repetitions: int = 20
    k_sim: int = 5
    d_proj: int = 16
    projection: str | None = field(default="signs", kw_only=True)
    fill_empty: bool = field(default=True, kw_only=True)
    final_dim: int | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _checks.choice("projection", self.projection, PROJECTIONS)
        if self.projection is None:
            object.__setattr__(self, "d_proj", self.d)
        bounds = {
            "d": (1, 1 << 20), "repetitions": (1, 1 << 20), "k_sim": (0, MOST_BITS), "d_proj": (1, 1 << 20),
            "seed": (0, (1 << 63) - 1),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            object.__setattr__(self, name, _checks.integer(name, getattr(self, name), low, high))
        if not isinstance(self.fill_empty, (bool, np.bool_)):
            raise TypeError(f"fill_empty must be True or False, got {self.fill_empty!r}")
        object.__setattr__(self, "fill_empty", bool(self.fill_empty))
        if self.final_dim is not None:
            object.__setattr__(self, "final_dim", _checks.integer("final_dim", self.final_dim, 1, 1 << 30))
        values = self.num_blocks * self.width
        if values > _MOST_VALUES:
            raise ValueError(
                f"repetitions = {self.repetitions}, k_sim = {self.k_sim} and blocks of {self.width} make "
                f"encodings of {values} values ({values * 4 / 1e9:.1f} GB each); at most {_MOST_VALUES}"
            )

    @property
    def num_blocks(self) -> int:
        return self.repetitions << self.k_sim

    @property
    def width(self) -> int:
        return self.d_proj

    @property
    def dim(self) -> int:
        return self.num_blocks * self.width if self.final_dim is None else self.final_dim

    @property
    def planes(self) -> np.ndarray:
        return _planes(self.seed, self.repetitions, self.d, self.k_sim)

    @property
    def signs(self) -> np.ndarray | None:
        if self.projection is None:
            return None
        if self.projection == "signs":
            return _signs(self.seed, self.repetitions, self.d, self.d_proj)
        return _count(self.seed, self.repetitions, self.d, self.d_proj)[1]

    @property
    def columns(self) -> np.ndarray | None:
        if self.projection != "count":
            return None
        return _count(self.seed, self.repetitions, self.d, self.d_proj)[0]

    def config(self) -> dict[str, Any]:
        """The parameters as values of JSON: ``FDE(**config)`` is this encoder."""
        return asdict(self)

    def encode_documents(self, tokens: Any, ptr: Any) -> Any:
        """Encodings of documents: `fde`."""
        return fde(tokens, ptr, self)

    def encode_queries(self, tokens: Any, ptr: Any, sparse: bool = False) -> Any:
        """Encodings of queries: `fde` with ``query=True``."""
        return fde(tokens, ptr, self, query=True, sparse=sparse)


# ---------------------------------------------------------------- what follows from parameters, read-only
def _fixed(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    for array in arrays:
        array.setflags(write=False)
    return arrays


@lru_cache(maxsize=8)
def _planes(*of: int) -> np.ndarray:
    return _fixed(reference.planes(*of))[0]


@lru_cache(maxsize=8)
def _signs(*of: int) -> np.ndarray:
    return _fixed(reference.signs(*of))[0]


@lru_cache(maxsize=8)
def _count(*of: int) -> tuple[np.ndarray, ...]:
    return _fixed(*reference.count(*of))


class _Tables(NamedTuple):
    """What an encoder computes with."""

    planes: np.ndarray
    psi: np.ndarray | None  # (repetitions, d, width) float32, to be multiplied by scale
    scale: float
    final: tuple[np.ndarray, np.ndarray, int] | None


@lru_cache(maxsize=8)
def tables_of(encoder: FDE) -> _Tables:
    psi, scale, final = None, 1.0, None
    if encoder.projection == "signs":
        assert encoder.signs is not None
        psi, scale = encoder.signs.astype(np.float32), encoder.d_proj**-0.5
    elif encoder.projection == "count":
        psi = np.zeros((encoder.repetitions, encoder.d, encoder.d_proj), np.float32)
        repetition, dimension = np.ogrid[: encoder.repetitions, : encoder.d]
        psi[repetition, dimension, encoder.columns] = encoder.signs
    if encoder.final_dim is not None:
        n = encoder.num_blocks * encoder.width
        final = (*reference.sketch(encoder.seed, n, encoder.final_dim), encoder.final_dim)
    return _Tables(encoder.planes, psi, scale, final)


class _Packed(NamedTuple):
    """The same as csrc/address/fde.h has it."""

    planes: np.ndarray
    psi: np.ndarray | None
    ld_psi: int
    scale: float
    final_map: np.ndarray | None


@lru_cache(maxsize=8)
def packed_of(encoder: FDE) -> _Packed:
    planes, psi, scale, final = tables_of(encoder)
    columns = np.ascontiguousarray(planes.transpose(1, 0, 2)).reshape(encoder.d, -1)
    ld, final_map = -(-encoder.width // _LANES) * _LANES, None
    if psi is not None and ld > encoder.width:
        psi = np.pad(psi, ((0, 0), (0, 0), (0, ld - encoder.width)))
    if final is not None:
        final_map = np.where(final[1] < 0, final[0] | np.int32(-1 << 31), final[0])
    return _Packed(columns, psi, ld, scale, final_map)


@lru_cache(maxsize=64)
def encoder_of(d, repetitions, k_sim, d_proj, projection, fill_empty, final_dim, seed) -> FDE:
    """The encoder behind the options of an op."""
    return FDE(
        d, repetitions, k_sim, d_proj, projection=projection, fill_empty=fill_empty, final_dim=final_dim,
        seed=seed,
    )  # fmt: skip


def _options(e: FDE) -> tuple[Any, ...]:
    return e.d, e.repetitions, e.k_sim, e.d_proj, e.projection, e.fill_empty, e.final_dim, e.seed


# ---------------------------------------------------------------- the op
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
