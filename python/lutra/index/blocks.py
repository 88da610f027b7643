"""Blocks: vectors that are searched by queries most of whose blocks are zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks, quant, scan
from .._arrays import BF16, F16, F32, I8, I32, I64, NUMPY, U8, kind_of
from .._results import Neighbors
from ..address._fde_encoder import BlockRows
from ..scan import _blocks
from . import _files
from ._block_rows import pack_int8, panel_parts, scan_int8, to_panels, to_rows, unpack_int8
from ._home import HOST, Home, adopt, check_matrix, deliver
from ._panels import Panels
from ._pq_scan import pq_scan
from ._quantizer_files import quantizer_tensors, restore_quantizer
from ._rows import Rows
from .base import Index, register
from .codes import sampled

_STORAGE = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8, "pq": U8}
_LANES, _CODE_LANES = 256, 512  # vectors of a panel; of codes more, for a query's tables are reread with each
_KERNELS = {I8: ("packed_logits",), U8: ("pq", "pq_encode", "list_lut")}  # that are needed on a GPU
_POINTS = 64  # training vectors for each centroid: of so many dimensions more would take gigabytes
_ENCODE = 1 << 10  # vectors that are coded at a time


@register
class Blocks(Index):
    """A collection for queries that have only some of their blocks, such as MUVERA's encodings.

    Vectors are cut into blocks of ``width`` dimensions. A search reads those blocks only that a query has: of
    a query's encoding of 640 blocks (`lutra.address.fde`) about 60 % at 32 tokens, 27 % at 10. Blocks of
    zeros add nothing to an inner product, so the results are those of a scan of everything.

    Parameters
    ----------
    d : int
        Dimension of the vectors.
    width : int
        Dimensions of a block; divides d.
    dtype : {'float16', 'float32', 'bfloat16', 'int8', 'pq'}, default 'float16'
        What vectors are stored as. float16 refuses what is beyond 65504; bfloat16 needs the package
        ml_dtypes. int8: whole numbers from -127 to 127 and a scale for each vector. pq: product quantization,
        256 centroids for each ``dsub`` dimensions, d / dsub bytes a vector; train the index first.
    metric : {'ip'}
        Inner products. A distance or a cosine also depends on the blocks that a query does not have.
    dsub : int, default 8
        For 'pq': dimensions of a sub-space; divides ``width``.
    seed : int, default 0
        For 'pq': of the training.

    Notes
    -----
    Memory: 4, 2 or 1 bytes a value (int8: and 4 a vector), or d / dsub bytes a vector and 2 KB a dimension
    for codebooks; 8 for an id where ids are not 0, 1, 2, ... Vectors lie in panels of 256 (codes: 512),
    of which the last is allocated whole.

    Cost: one read of the blocks that some query of the batch has, 2 width flops for each block of each query
    and vector (pq: width / dsub look-ups). Scores are fp32 sums over blocks, then dimensions, in increasing
    order (int8: of whole numbers, then times the scale), so neither the batch nor the number of threads
    changes them.

    On a GPU vectors are kept whole and all of them are read: by `lutra.scan.knn`, int8 by
    `lutra.scan.packed_topk`, whose products run on tensor cores, pq by `lutra.scan.pq`.

    References
    ----------
    Dhulipala et al., MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings, NeurIPS 2024,
    arXiv 2405.19504.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> index = lutra.index.Blocks(d=8, width=2, dtype="float32")
    >>> index.add(np.arange(16, dtype=np.float32).reshape(2, 8))
    >>> index.search(np.array([[0, 0, 0, 0, 1, 2, 0, 0]], np.float32), k=2)
    Neighbors(scores=array([[38., 14.]], dtype=float32), ids=array([[1, 0]]))
    """

    _metrics = {"ip": 0}  # noqa: RUF012

    def __init__(
        self, d: int, width: int, dtype: str = "float16", metric: str = "ip", *, dsub: int = 8, seed: int = 0
    ) -> None:
        if metric != "ip":
            raise ValueError(
                f"metric must be 'ip', got {metric!r}: a block that a query does not have adds nothing to an "
                "inner product, but to a distance and to a norm, so every block would have to be read"
            )
        self._code = _checks.choice("dtype", dtype, _STORAGE)
        self._needs_kernels = _KERNELS.get(self._code, ("knn",))
        super().__init__(d, metric)
        self.width = _checks.integer("width", width, 1)
        if self.d % self.width:
            raise ValueError(f"width must divide d = {self.d}, got {self.width}")
        self.dtype = dtype
        self.dsub = _checks.integer("dsub", dsub, 1)
        self.seed = _checks.integer("seed", seed, 0)
        self.quantizer: quant.PQ | None = None
        self._books: np.ndarray | None = None  # the quantizer's codebooks as they are scanned
        depth, lanes = self.width, _LANES
        if dtype == "pq":
            if self.width % self.dsub:
                raise ValueError(f"dsub must divide width = {self.width}, got {self.dsub}")
            self.quantizer = quant.PQ(self.d, self.d // self.dsub, 8, seed=self.seed)
            depth, lanes = self.width // self.dsub, _CODE_LANES
        elif dtype == "int8":
            self._rows["scale"] = Rows(HOST, 1, F32)
        try:
            storage = np.dtype(NUMPY.dtype(self._code))
        except ImportError as error:
            raise ImportError(
                "dtype 'bfloat16' needs the package ml_dtypes: pip install ml_dtypes"
            ) from error
        self._panels = Panels(self.d // self.width, depth, lanes, storage)

    @property
    def num_blocks(self) -> int:
        """Blocks of a vector: d / width."""
        return self.d // self.width

    @property
    def is_trained(self) -> bool:
        return self.quantizer is None or self.quantizer.is_trained

    @property
    def nbytes(self) -> int:
        books = (
            0 if self._books is None else 2 * self._books.nbytes
        )  # as they are coded, and as they are scanned
        return super().nbytes + self._panels.nbytes + books

    # ---- training and adding
    def train(self, x: Any, *, n_iter: int = 10, progress: bool | None = None) -> None:
        """Learn the codebooks of 'pq'; the other dtypes need no training.

        Parameters
        ----------
        x : array, shape (n, d)
            At least 256 vectors like those that will be added; at most 16,384 are used, drawn by a seed.
        n_iter : int, default 10
            Iterations of k-means.
        progress : bool or None
            A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

        Raises
        ------
        TypeError, ValueError
            As `lutra.quant.PQ.train`; an index that holds vectors, whose codes would lose their meaning.
        """
        native = check_matrix(x, "x", self.d)
        if self.quantizer is None:
            return
        with self._changing():
            if self.ntotal:
                raise ValueError(f"the index holds {self.ntotal} coded vectors; train a new one")
            points = sampled(native, 256 * _POINTS, self.seed, self._settle(native))
            self.quantizer.train(points, n_iter=n_iter, max_points_per_centroid=_POINTS, progress=progress)
            self._lay_books()

    def _lay_books(self) -> None:
        assert self.quantizer is not None
        self._books = np.ascontiguousarray(self.quantizer._books.transpose(0, 2, 1))

    def _begin(self, count: int) -> None:
        if self._here is HOST:
            self._panels.reserve(count)

    def _encode(self, x, out, first):
        if self._here is not HOST:
            self._encode_on_gpu(x, out, first)
            return
        for i in range(0, len(x), _ENCODE):
            part = x[i : i + _ENCODE]
            stored = self._stored(
                part, None if "scale" not in out else out["scale"][i : i + _ENCODE], first + i
            )
            self._panels.write(first + i, stored)

    def _stored(self, x: np.ndarray, scale: np.ndarray | None, first: int) -> np.ndarray:
        """Vectors as they are stored; int8: and their scales."""
        if self.quantizer is not None:
            return self.quantizer._encode(np.ascontiguousarray(x))
        if scale is not None:
            most = np.abs(x).max(1, keepdims=True)
            scale[:] = most / np.float32(127)
            safe = np.where(most > 0, most, 1)
            return np.rint(x / safe * np.float32(127)).astype(np.int8)
        with np.errstate(over="ignore"):  # reported below
            stored = np.ascontiguousarray(x, self._panels.dtype)
        if self._code != F32 and not HOST.all_finite(stored.astype(np.float32)):
            row, column = (int(v) for v in np.argwhere(~np.isfinite(stored.astype(np.float32)))[0])
            raise ValueError(
                f"x[{first + row}, {column}] is {x[row, column]}, which is too large for {self.dtype}"
            )
        return stored

    def _added(self, first: int, count: int) -> None:
        if self._here is HOST:
            self._panels.grow(count)

    def _removing(self, keep: np.ndarray, before: int) -> None:
        if self._here is HOST:
            self._panels.keep(keep)

    # ---- on a GPU
    @property
    def _here(self) -> Home:
        return self._home or HOST

    def _move(self, home: Home) -> None:
        if home is HOST and "vectors" in self._rows:
            to_panels(self._rows.pop("vectors"), self._panels)
        panels, fresh = self._panels, home is not HOST and "vectors" not in self._rows
        scale = self._rows.get("scale")
        rows = to_rows(panels, home, self._code, scale) if fresh and not self._lacking(home) else None
        super()._move(home)
        if rows is not None:
            self._rows["vectors"], self._panels = rows, Panels(*panels.shape, panels.dtype)

    def _encode_on_gpu(self, x: Any, out: dict[str, Any], first: int) -> None:
        home, vectors = self._here, out["vectors"]
        xp, cast = home.xp, home.kind.cast
        if self.quantizer is not None:
            vectors[:] = self.quantizer._encode_there(home.kind, x)
            return
        if self._code == I8:
            most = xp.amax(abs(x), 1)[:, None]
            out["scale"][:] = most / 127
            stored = cast(xp.round(x / xp.where(most > 0, most, 1) * 127), I8)
            pack_int8(home, stored, out["scale"], vectors)
            return
        vectors[:] = cast(x, self._code)
        if self._code == F32 or home.all_finite(cast(vectors, F32)):
            return
        good = HOST.bring(xp.isfinite(cast(vectors, F32)))
        row, column = (int(v) for v in np.argwhere(~good)[0])
        raise ValueError(
            f"x[{first + row}, {column}] is {float(x[row, column])}, which is too large for {self.dtype}"
        )

    # ---- searching
    def search(self, q: Any, k: int = 10, *, filter: Any = None) -> Neighbors:
        """The k best vectors for each query, given dense: its blocks of zeros are found and passed over.

        Parameters
        ----------
        q, k, filter
            As in `Flat.search`.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `Flat.search`. Scores are those of the stored vectors. pq: the best are chosen by tables
            that are rounded to 8 bits where the processor has AVX-512 VBMI, then several times k of them are
            scored in fp32.

        Raises
        ------
        TypeError, ValueError
            As `Flat.search`.
        """
        return self._answer(q, k, filter)

    def _search(self, q, k, keep):
        home = self._here
        if home is HOST:
            return self._scan(_blocks.dense_rows(q, self.width), k, keep)
        rows = self._rows["vectors"].view
        if self.quantizer is not None:
            return pq_scan(home, q, rows, self.quantizer._books_there(home.kind, q), k, "ip", keep)
        if self._code == I8:
            return scan_int8(home, q, rows, k, keep)
        return scan.knn(q, rows, k, "ip", filter=keep)

    def search_blocks(self, rows: Any, k: int = 10, *, filter: Any = None) -> Neighbors:
        """The k best vectors for each query, given by the blocks that it has.

        Parameters
        ----------
        rows : lutra.address.BlockRows
            Or any object with the arrays ``ptr`` (nq + 1,), ``blocks`` (nnz,), rising within a query, and
            ``values`` (nnz, width): see `lutra.address.fde` with ``sparse=True``.
        k, filter
            As in `Flat.search`.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `search`, of the kind of ``rows.values``.

        Raises
        ------
        TypeError
            Attributes that are missing or no arrays, or other dtypes.
        ValueError
            Offsets that do not rise from 0 to nnz, blocks out of range or not rising, another width, values
            that are not finite; k < 1; an index that is empty or not trained.

        Notes
        -----
        Rows are checked on the host. With an index on a GPU, give `search` dense queries.
        """
        with self._lock.reading():
            checked = self._check_rows(rows)
            k = _checks.integer("k", k, 1)
            if not self._ids.n:
                self._nothing()
            home = self._here
            keep = None if filter is None else self._keep(home, filter)
            if home is HOST:
                scores, positions = self._scan(checked, k, keep)
            else:
                q = BlockRows(*checked).dense(self.num_blocks)
                scores, positions = self._search(home.bring(q), k, keep)
            return Neighbors(*deliver(home, (scores, self._ids.of(home, positions)), rows.values))

    def _check_rows(self, rows: Any) -> _blocks.Rows:
        arrays = []
        for name, codes, dims in (
            ("ptr", (I64,), 1),
            ("blocks", (I32, I64), 1),
            ("values", (F32, F16, BF16), 2),
        ):
            if not hasattr(rows, name):
                raise TypeError(
                    f"rows must have the arrays ptr, blocks and values (lutra.address.BlockRows), "
                    f"got {type(rows).__name__}"
                )
            native = adopt(getattr(rows, name), f"rows.{name}")
            kind = kind_of(native, f"rows.{name}")
            _checks.dtype(kind, native, f"rows.{name}", codes)
            _checks.ndim(native, f"rows.{name}", dims)
            arrays.append(HOST.bring(native))
        ptr, blocks, values = arrays
        nnz = len(values)
        if values.shape[1] != self.width:
            raise ValueError(f"rows.values has {values.shape[1]} columns; the index has width = {self.width}")
        if len(blocks) != nnz:
            raise ValueError(
                f"rows.blocks has {len(blocks)} entries, rows.values {nnz}; they must be as many"
            )
        if len(ptr) < 1 or ptr[0] != 0 or ptr[-1] != nnz or (ptr[1:] < ptr[:-1]).any():
            raise ValueError(f"rows.ptr must rise from 0 to {nnz}, the number of blocks")
        outside = (blocks < 0) | (blocks >= self.num_blocks)
        if outside.any():
            i = int(outside.argmax())
            raise ValueError(
                f"rows.blocks[{i}] is {int(blocks[i])}; the index has blocks 0 to {self.num_blocks - 1}"
            )
        rises = blocks[1:] > blocks[:-1]
        rises[ptr[(ptr > 0) & (ptr < nnz)] - 1] = True  # the first block of a query
        if not rises.all():
            raise ValueError(f"rows.blocks[{int(rises.argmin()) + 1}] must be greater than the one before it")
        values = np.ascontiguousarray(values, np.float32)
        if not HOST.all_finite(values):
            i, j = (int(v) for v in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(f"rows.values[{i}, {j}] is {values[i, j]}; queries must be finite")
        return _blocks.Rows(np.ascontiguousarray(ptr), np.ascontiguousarray(blocks, np.int32), values)

    def _scan(self, rows: _blocks.Rows, k: int, keep: np.ndarray | None) -> tuple[Any, Any]:
        scale = self._rows["scale"].view if "scale" in self._rows else None
        return _blocks.scan(rows, self._panels, k, scale, self._books, keep)

    def _reconstruct(self, positions):
        if self._here is not HOST:
            return self._reconstruct_on_gpu(self._rows["vectors"].view[positions], positions)
        stored = self._panels.take(positions)
        if self.quantizer is not None:
            return self.quantizer._decode(stored)
        vectors = stored.astype(np.float32)
        return vectors * self._rows["scale"].view[positions] if "scale" in self._rows else vectors

    def _reconstruct_on_gpu(self, rows: Any, positions: Any) -> Any:
        kind = self._here.kind
        if self.quantizer is not None:
            return self.quantizer._decode_there(kind, rows)
        if self._code == I8:
            return kind.cast(unpack_int8(self._here, rows), F32) * self._rows["scale"].view[positions]
        return kind.cast(rows, F32)

    # ---- files
    def _config(self) -> dict[str, Any]:
        config = {"d": self.d, "width": self.width, "dtype": self.dtype, "metric": self.metric}
        return config if self.quantizer is None else {**config, "dsub": self.dsub, "seed": self.seed}

    @property
    def _tensor(self) -> str:
        return "vectors" if self.quantizer is None else "codes"

    def _contents(self) -> tuple[list[_files.Tensor], dict[str, str]]:
        tensors, metadata = super()._contents()
        panels, rows = self._panels, self._rows.get("vectors")
        tensors = [tensor for tensor in tensors if tensor.name != "vectors"]
        shape = (-(-self.ntotal // panels.lanes), *panels.shape)
        parts = panels.parts if rows is None else lambda: panel_parts(rows, panels)
        tensors.append(_files.Tensor(self._tensor, _files.NAMES[self._code], shape, parts))
        if self.quantizer is not None and self.is_trained:
            tensors += quantizer_tensors(self.quantizer)
        return tensors, metadata

    def _restore(self, file: _files.File, n: int, mmap: bool) -> None:
        trained = file.config.get("trained")
        if trained is not True and (trained is not False or n or self.quantizer is None):
            file.fail("the metadata 'trained' is not true, but there are vectors, or nothing to train")
        if trained and self.quantizer is not None:
            restore_quantizer(file, self.quantizer)
            self._lay_books()
        panels = self._panels
        shape = ((n + panels.lanes - 1) // panels.lanes, *panels.shape)
        arrays, _ = file.tensor(self._tensor, _files.NAMES[self._code], shape, mmap=mmap)
        panels.restore(arrays, n)
        if self.dtype == "int8":
            scale, mapped = file.tensor("scale", "F32", (n, 1), mmap=mmap)
            self._rows["scale"] = Rows.of(scale, F32, mapped=mapped)
