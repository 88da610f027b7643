"""FDE: parameters of fixed dimensional encodings, and the arrays that follow from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import is_torch
from ..reference import fde as reference

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
        from ._fde import fde

        return fde(tokens, ptr, self)

    def encode_queries(self, tokens: Any, ptr: Any, sparse: bool = False) -> Any:
        """Encodings of queries: `fde` with ``query=True``."""
        from ._fde import fde

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
