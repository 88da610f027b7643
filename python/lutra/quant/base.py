"""Quantizer: what turns vectors into codes of a few bytes and back, and says how the codes are scanned."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import U8, _foreign, _hand_back, kind_of
from ..index._home import HOST, Home, adopt, check_matrix, deliver, home_of, to_float32
from ..index._progress import Progress
from ._on_cuda import Copies
from ._trained import Trained

PART = 1 << 14  # rows that are coded at a time, so that what lies between vectors and codes stays small
TABLE_METRICS = {"ip": 0, "l2": 1}


class Tables(NamedTuple):
    """Look-up tables of queries, see `Quantizer.tables`.

    Attributes
    ----------
    lut : array, shape (nq, m, 16 or ksub), float32
    bias : array, shape (nq,), float32, or None where it is 0
    """

    lut: Any
    bias: Any


class RowTerms(NamedTuple):
    """What a row adds to its look-ups and multiplies them by, see `Quantizer.row_terms`.

    Attributes
    ----------
    add : array, shape (n,), float32, or None where it is 0
    mul : array, shape (n,), float32, or None where it is 1
    """

    add: Any
    mul: Any


class Quantizer(Trained):
    """The interface of all quantizers.

    A quantizer is made with its dimensions, trained on a sample, and then codes vectors: ``encode`` gives
    ``code_size`` bytes for each, ``decode`` the vectors that codes stand for. Indexes scan codes without
    decoding them: ``scan`` says how.

    Attributes
    ----------
    d : int
        Dimension of the vectors.
    code_size : int
        Bytes of a vector's code.
    scan : {'lut4', 'lut8', 'decode'}
        ``'lut4'`` and ``'lut8'``: a score is a sum of ``m`` look-ups with entries below 16 or 256 (`entries`,
        `tables`, `row_terms`); ``'decode'``: decode and multiply.
    m : int
        Look-ups of a row; 0 for ``'decode'``.

    Notes
    -----
    The linear form of the look-ups is, for a query q and a row with entries e::

        <q, decode(code)> = bias(q) + mul(row) * sum_j lut[q, j, e_j] + add(row)

    up to float32's rounding (`RaBitQ` corrects it by what it knows of the row). Squared distances follow from
    it, |q|^2 - 2 <q, x> + |x|^2 with |x|^2 from `norms`, unless a quantizer has tables of distances.

    Arrays may be NumPy, torch, CuPy or any with DLPack; results come back in the caller's library and on its
    device, all work is done on the CPU. The same seed and vectors give the same codes, whatever the number of
    threads and however the vectors are cut into batches. Only ``train`` changes a quantizer: any number of
    threads may encode and decode with it at once.
    """

    d: int
    code_size: int
    scan: str
    m: int

    def __init__(self, d: int) -> None:
        self.d = _checks.integer("d", d, 1)
        self._copies = Copies()

    # ---- what a kind of quantizer says about itself
    @property
    def _uses_directions(self) -> bool:
        """Whether training and encoding take ``directions``: the vectors whose residuals are coded."""
        return False

    @abstractmethod
    def _encode(self, x: np.ndarray) -> np.ndarray:
        """Codes (n, code_size) of a few finite float32 rows."""

    @abstractmethod
    def _decode(self, codes: np.ndarray) -> np.ndarray:
        """Float32 rows of a few codes."""

    @abstractmethod
    def train(self, x: Any, *, progress: bool | None = None) -> Quantizer:
        """Learn from a sample of vectors, and return the quantizer itself."""

    # ---- codes
    def encode(self, x: Any, *, progress: bool | None = None) -> Any:
        """The codes of vectors.

        Parameters
        ----------
        x : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8
        progress : bool or None
            A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

        Returns
        -------
        array, shape (n, code_size), uint8, of the kind of ``x``

        Raises
        ------
        TypeError
            ``x`` is no array or has another dtype.
        ValueError
            A shape that does not fit, NaN or infinities (the row is named), or no training yet.

        Notes
        -----
        Vectors on a GPU are coded there by `PQ`, `OPQ` and `RQ` of 2, 4 or 8 bits, else by the host. Sums are
        in another order: centroids that are equally near up to rounding may be exchanged.
        """
        self._need_training()
        native = vectors(x, "x", self.d)
        n, kind = native.shape[0], kind_of(native, "x")
        if kind.cuda and kind.kernels is not None:
            there = self._encode_there(kind, native)
            if there is not None:
                return _hand_back(there, x) if _foreign(x) else there
        codes = np.empty((n, self.code_size), np.uint8)
        with Progress(n, f"{type(self).__name__} encoding", progress) as bar:
            for i in range(0, n, PART):
                part = HOST.kind.dense(to_float32(HOST, native[i : i + PART], "x", i))
                codes[i : i + PART] = self._encode(part)
                bar.tick(len(part))
        return deliver(HOST, (codes,), x)[0]

    def _encode_there(self, kind: Any, x: Any) -> Any:
        """The codes of vectors on a GPU, or None: by the host."""
        return None

    def decode(self, codes: Any) -> Any:
        """The vectors that codes stand for.

        Parameters
        ----------
        codes : array, shape (n, code_size), uint8
            Any bytes are a code of some vector.

        Returns
        -------
        array, shape (n, d), float32, of the kind of ``codes``

        Raises
        ------
        TypeError, ValueError
            ``codes`` is no array, has another dtype or shape, or there was no training yet.
        """
        native = self._check_codes(codes)
        n = native.shape[0]
        x = np.empty((n, self.d), np.float32)
        for i in range(0, n, PART):
            x[i : i + PART] = self._decode(native[i : i + PART])
        return deliver(HOST, (x,), codes)[0]

    # ---- scanning
    def entries(self, codes: Any) -> Any:
        """The look-up entries of codes, a byte each: (n, code_size) to (n, m) uint8.

        Raises
        ------
        TypeError, ValueError
            As `decode`; a quantizer whose codes are not scanned by look-ups.
        """
        self._need_tables()
        native = self._check_codes(codes)
        out = np.empty((native.shape[0], self.m), np.uint8)
        for i in range(0, len(out), PART):
            out[i : i + PART] = self._entries(native[i : i + PART])
        return deliver(HOST, (out,), codes)[0]

    def tables(self, q: Any, metric: str = "ip") -> Tables | None:
        """Look-up tables of queries.

        Parameters
        ----------
        q : array, shape (nq, d)
        metric : {'ip', 'l2'}
            ``'ip'``: of the linear form (see the class). ``'l2'``: tables whose sums are squared distances.

        Returns
        -------
        Tables or None
            None for ``'l2'`` where the quantizer has no tables of distances: take those for ``'ip'``.

        Raises
        ------
        TypeError, ValueError
            As `encode`; a quantizer whose codes are not scanned by look-ups.
        """
        self._need_tables()
        self._need_training()
        _checks.choice("metric", metric, TABLE_METRICS)
        native = vectors(q, "q", self.d)
        made = self._tables(HOST.kind.dense(to_float32(HOST, native, "q")), metric)
        if made is None or made.bias is None:
            return made and Tables(deliver(HOST, (made.lut,), q)[0], None)
        return Tables(*deliver(HOST, tuple(made), q))

    def row_terms(self, codes: Any) -> RowTerms:
        """The terms ``add`` and ``mul`` of rows in the linear form; None where they are all 0 or all 1.

        Raises
        ------
        TypeError, ValueError
            As `decode`.
        """
        native = self._check_codes(codes)
        terms = self._row_terms(native)
        made = [a for a in terms if a is not None]
        given = iter(deliver(HOST, tuple(made), codes))
        return RowTerms(*(None if a is None else next(given) for a in terms))

    def norms(self, codes: Any) -> Any:
        """The squared norms that belong in squared distances made of the linear form: shape (n,), float32.

        |decode(code)|^2, or what the code says of the vector's own norm where that is better (`RaBitQ`). For
        residuals to a centroid c take ``norms(codes) + 2 <c, decode(codes)>``.

        Raises
        ------
        TypeError, ValueError
            As `decode`.
        """
        native = self._check_codes(codes)
        out = np.empty(native.shape[0], np.float32)
        for i in range(0, len(out), PART):
            out[i : i + PART] = self._norms(native[i : i + PART])
        return deliver(HOST, (out,), codes)[0]

    def _norms(self, codes: np.ndarray) -> np.ndarray:
        x = self._decode(codes)
        return np.einsum("ij,ij->i", x, x)

    def _entries(self, codes: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _tables(self, q: np.ndarray, metric: str) -> Tables | None:
        raise NotImplementedError

    def _row_terms(self, codes: np.ndarray) -> RowTerms:
        return RowTerms(None, None)

    def _screen(self) -> tuple[np.ndarray, float] | None:
        """For scalar codes, whose tables are a query's values times levels: the levels (2**bits,), and what
        the highest bit alone stands for, +-that. None: no scan by the highest bits."""
        return None

    # ---- checks
    def _need_tables(self) -> None:
        if self.scan == "decode":
            raise ValueError(
                f"codes of {self!r} are not scanned by look-ups (scan is 'decode'): decode them instead"
            )

    def _check_codes(self, codes: Any) -> np.ndarray:
        self._need_training()
        native = adopt(codes, "codes")
        _checks.dtype(kind_of(native, "codes"), native, "codes", (U8,))
        if len(native.shape) != 2 or native.shape[1] != self.code_size:
            raise ValueError(f"codes must have shape (n, {self.code_size}), got {tuple(native.shape)}")
        return HOST.kind.dense(HOST.bring(native))


def vectors(x: Any, name: str, d: int) -> Any:
    """A caller's matrix with d columns as a native array."""
    native = check_matrix(x, name)
    if native.shape[1] != d:
        raise ValueError(f"{name} has {native.shape[1]} columns; the quantizer has d = {d}")
    return native


def training_home(x: Any) -> Home:
    """Where k-means runs that is given ``x``: on its GPU, where that has kernels, or on the host."""
    home = home_of(adopt(x, "x"))
    return home if home.kind.kernels is not None else HOST


def training_matrix(x: Any, d: int, least: int, most: int | None, seed: int, home: Home = HOST) -> Any:
    """The float32 rows to train on: all of ``x``, or ``most`` of them, drawn by ``seed``.

    A ValueError where there are fewer than ``least``.
    """
    native = vectors(x, "x", d)
    n = native.shape[0]
    if n < least:
        raise ValueError(f"x has {n} rows; at least {least} are needed to train on")
    if most is not None and n > most:
        rows = np.sort(np.random.default_rng(seed).choice(n, most, replace=False))
        return to_float32(home, home.bring(native)[home.positions(rows)], "x", rows)
    return home.kind.dense(to_float32(home, native, "x"))
