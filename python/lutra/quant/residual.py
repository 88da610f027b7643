"""ResidualQuantizer: token vectors as the nearest centroid and a few bits a dimension, as in PLAID."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from .. import _checks, address
from .._arrays import I32, U8, kind_of
from ..index._home import HOST, Home, adopt, deliver, to_float32
from ..index._kmeans import kmeans
from ..index._progress import Progress
from ..scan._maxsim_tokens import ResidualTokens
from . import _bits
from ._trained import Trained
from .base import PART, training_home, vectors

_BITS = {1: 1, 2: 2, 4: 4, 8: 8}
_HELD_OUT = 20_000  # tokens at most whose residuals give the values
_ENOUGH = 100  # fewer are not held out: the residuals of the others give the values
_LLOYD = 100  # iterations at most
_GPU_PART = 1 << 18  # tokens that are encoded at a time on a GPU
_LEVELS = {"lloyd": 0, "quantiles": 1}
_UNIT = 0.02  # how far norms may be from 1 for tokens of unit norm


class ResidualQuantizer(Trained):
    """Token vectors as a centroid and the residual to it in 1, 2, 4 or 8 bits a dimension (PLAID, ColBERTv2).

    Parameters
    ----------
    d : int
        Dimension of the token vectors.
    bits : {1, 2, 4, 8}, default 2
        Bits of a dimension's residual.
    num_centroids : int, optional
        Default: ColBERT's rule, 2^floor(log2(16 sqrt(n))) for n tokens, and no more than n / 4.
    normalize : bool, optional
        Whether tokens are unit vectors, as ColBERT's are: then centroids and decoded tokens are, too.
        Default: whether those are that it is trained on.

    Attributes
    ----------
    centroids : numpy.ndarray, shape (num_centroids, d), float32, or None before training
    values : numpy.ndarray, shape (2**bits,), float32, or None before training
        What the codes of a dimension stand for, increasing.
    normalize : bool, or None before training where it was not given
    code_size : int
        Bytes of a token: 4 for the centroid, and its codes.

    Notes
    -----
    One set of values serves all dimensions. PLAID takes the medians of 2**bits equally large parts of the
    residuals (``levels="quantiles"``), which are many where residuals are small, and few where the error is
    made; by default these are only where Lloyd's iterations begin, which lessen the squared error until
    nothing changes. A residual gets the nearest value.

    `lutra.scan.maxsim` scores the codes without decoding them to memory.

    References
    ----------
    Santhanam et al., ColBERTv2, NAACL 2022, arXiv 2112.01488. Santhanam et al., PLAID, CIKM 2022, arXiv
    2205.09707. Lloyd, Least squares quantization in PCM, 1982.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> tokens = np.random.default_rng(0).standard_normal((500, 16), dtype=np.float32)
    >>> quantizer = lutra.quant.ResidualQuantizer(16, bits=4).train(tokens)
    >>> quantizer.encode(tokens).codes.shape
    (500, 8)
    """

    def __init__(
        self, d: int, bits: int = 2, num_centroids: int | None = None, *, normalize: bool | None = None
    ) -> None:
        self.d = _checks.integer("d", d, 1)
        if isinstance(bits, bool) or bits not in _BITS:
            raise ValueError(f"bits must be 1, 2, 4 or 8; got {bits!r}")
        self.bits = int(bits)
        if normalize not in (None, True, False):
            raise TypeError(f"normalize must be True, False or None, got {normalize!r}")
        if num_centroids is not None:
            num_centroids = _checks.integer("num_centroids", num_centroids, 1, 2**31 - 1)
        self._given = num_centroids, None if normalize is None else bool(normalize)
        self.normalize = self._given[1]
        self.code_size = 4 + _bits.packed_size(self.d, self.bits)
        self.centroids: np.ndarray | None = None
        self.values: np.ndarray | None = None

    @classmethod
    def of(cls, centroids: Any, values: Any, bits: int, normalize: bool) -> ResidualQuantizer:
        """A trained quantizer of given centroids (nc, d) and increasing values (2**bits,)."""
        books = HOST.bring(vectors(centroids, "centroids", centroids.shape[-1]))
        made = cls(books.shape[1], bits, len(books), normalize=bool(normalize))
        steps = np.asarray(HOST.bring(adopt(values, "values")), np.float32)
        made._restore({"centroids": np.ascontiguousarray(books, np.float32), "values": steps})
        return made

    @property
    def num_centroids(self) -> int | None:
        """Number of centroids; None where training decides."""
        return self._given[0] if self.centroids is None else len(self.centroids)

    @property
    def is_trained(self) -> bool:
        return self.centroids is not None

    # ---- training
    def train(
        self, tokens: Any, *, total: int | None = None, levels: str = "lloyd", n_iter: int = 20,
        seed: int = 0, progress: bool | None = None,
    ) -> ResidualQuantizer:  # fmt: skip
        """Learn centroids and values from token vectors.

        Parameters
        ----------
        tokens : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8
            At least as many as centroids. A part of them, drawn by ``seed``, is used where there are more
            than 256 for each centroid.
        total : int, optional
            How many tokens there will be in all where ``tokens`` is a sample: decides the number of centroids
            where none was given.
        levels : {'lloyd', 'quantiles'}, default 'lloyd'
            The values: those of least squared error, or PLAID's (see above).
        n_iter : int, default 20
            Of k-means.
        seed : int, default 0
        progress : bool or None
            A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

        Returns
        -------
        ResidualQuantizer
            Itself.

        Raises
        ------
        TypeError, ValueError
            ``tokens`` is no matrix of d columns, has fewer rows than there shall be centroids, or holds NaN
            or infinities (the row is named); zero vectors where tokens are unit vectors. The quantizer is
            then as it was.

        Notes
        -----
        Cost: 2 n nc d flops an iteration (see `lutra.index.kmeans`). Of tokens on a GPU the centroids are
        computed there.
        """
        _checks.choice("levels", levels, _LEVELS)
        native = vectors(tokens, "tokens", self.d)
        home, native = training_home(native), HOST.bring(native)
        n = len(native)
        wanted, normalize = self._given
        count = wanted or self._rule(n, total)
        if n < count:
            raise ValueError(f"tokens has {n} rows; at least {count} are needed, one for each centroid")
        order = np.random.default_rng(seed).permutation(n)
        held = min(n // 20, n - count, _HELD_OUT)
        held = held if held >= _ENOUGH else 0
        rows = np.sort(order[held : held + 256 * count])
        points = to_float32(HOST, native[rows], "tokens", rows)
        if normalize is None:
            norms = np.sqrt(np.einsum("ij,ij->i", points, points))
            normalize = bool((np.abs(norms - 1) <= _UNIT).all())
        if normalize:
            points = _unit(points, rows)
        with warnings.catch_warnings():
            if wanted is None:  # few tokens for a centroid: that is the rule
                warnings.simplefilter("ignore", UserWarning)
            centroids = kmeans(
                home.bring(points), count, n_iter=n_iter, spherical=normalize, seed=seed, progress=progress,
                max_points_per_centroid=None,
            ).centroids  # fmt: skip
        centroids = HOST.bring(centroids)
        if held:
            rows = np.sort(order[:held])
            points = to_float32(HOST, native[rows], "tokens", rows)
            points = _unit(points, rows) if normalize else points
        else:
            points = points[:_HELD_OUT]
        residuals = points - centroids[address.nearest(points, centroids).ids[:, 0]]
        self.values = _levels(np.sort(residuals, None), self.bits, levels == "lloyd")
        self.centroids, self.normalize = centroids, normalize
        return self

    @staticmethod
    def _rule(n: int, total: int | None) -> int:
        total = n if total is None else _checks.integer("total", total, 1)
        most = max(1, min(16 * math.sqrt(total), n / 4))
        return 1 << int(math.log2(most))

    # ---- codes
    def encode(self, tokens: Any, *, progress: bool | None = None) -> ResidualTokens:
        """The codes of token vectors.

        Parameters
        ----------
        tokens : array, shape (n, d), float32, float16, bfloat16, float64, uint8 or int8
            Divided by their norms first where `normalize` is set; zero vectors stay what they are.
        progress : bool or None
            As for `train`.

        Returns
        -------
        ResidualTokens
            ``codes`` (n, ceil(d bits / 8)) uint8, ``centroid_ids`` (n,) int32, and the ``centroids``,
            ``values`` and ``normalize`` of the quantizer; arrays of the kind of ``tokens``.

        Raises
        ------
        TypeError, ValueError
            As `train`; no training yet.

        Notes
        -----
        Cost: 2 n nc d flops for the nearest centroids (see `lutra.address.nearest`). Tokens on a GPU are
        encoded there.
        """
        self._need_training()
        assert self.centroids is not None and self.values is not None
        native = vectors(tokens, "tokens", self.d)
        n, home = int(native.shape[0]), training_home(native)
        step = PART if home is HOST else _GPU_PART
        codes = home.empty((n, self.code_size - 4), U8)
        ids = home.empty((n,), I32)
        centroids, values = home.bring(self.centroids), home.bring(self.values)
        cuts = (self.values[1:] + self.values[:-1]) / 2
        with Progress(n, "ResidualQuantizer encoding", progress) as bar:
            for i in range(0, n, step):
                part = home.kind.dense(to_float32(home, native[i : i + step], "tokens", i))
                part = home.normalise(part) if self.normalize else part
                nearest = address.nearest(part, centroids).ids[:, 0]
                ids[i : i + step] = nearest
                residuals = part - centroids[nearest]
                if home is HOST:
                    codes[i : i + step] = _bits.pack(_entries(residuals, cuts), self.bits)
                else:
                    codes[i : i + step] = _bits.pack_there(
                        home, _entries_there(home, residuals, cuts), self.bits
                    )
                bar.tick(len(part))
        codes, ids, centroids, values = deliver(home, (codes, ids, centroids, values), tokens)
        return ResidualTokens(codes, ids, centroids, values, bool(self.normalize))

    def decode(self, tokens: ResidualTokens) -> Any:
        """The token vectors that codes stand for.

        Parameters
        ----------
        tokens : ResidualTokens
            ``codes`` and ``centroid_ids`` are read; centroids and values are the quantizer's own.

        Returns
        -------
        array, shape (n, d), float32, of the kind of ``tokens.codes``

        Raises
        ------
        TypeError, ValueError
            ``tokens`` are no ResidualTokens, or of other dtypes or shapes; no training yet.
        IndexError
            A centroid that is not there.
        """
        self._need_training()
        assert self.centroids is not None and self.values is not None
        codes, ids = self._check_tokens(tokens)
        x = np.empty((len(codes), self.d), np.float32)
        per = 8 // self.bits
        table = self.values[_bits.unpack(np.arange(256, dtype=np.uint8)[:, None], per, self.bits)]
        for i in range(0, len(codes), PART):
            part = table[codes[i : i + PART]].reshape(-1, codes.shape[1] * per)[:, : self.d]
            part = part + self.centroids[ids[i : i + PART]]
            x[i : i + PART] = HOST.normalise(part) if self.normalize else part
        return deliver(HOST, (x,), tokens.codes)[0]

    def _check_tokens(self, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(tokens, ResidualTokens):
            raise TypeError(f"tokens must be lutra.scan.ResidualTokens, as encode gives; got {type(tokens)}")
        found = []
        for name, code in (("codes", U8), ("centroid_ids", I32)):
            native = adopt(getattr(tokens, name), f"tokens.{name}")
            _checks.dtype(kind_of(native, name), native, f"tokens.{name}", (code,))
            found.append(HOST.bring(native))
        codes, ids = found
        if codes.ndim != 2 or codes.shape[1] != self.code_size - 4 or ids.shape != codes.shape[:1]:
            raise ValueError(
                f"tokens must have codes (n, {self.code_size - 4}) and centroid_ids (n,), "
                f"got {codes.shape} and {ids.shape}"
            )
        outside = (ids < 0) | (ids >= len(self.centroids))  # type: ignore[arg-type]
        if outside.any():
            i = int(outside.argmax())
            raise IndexError(
                f"tokens.centroid_ids[{i}] is {ids[i]}; there are {self.num_centroids} centroids"
            )
        return codes, ids

    # ---- files
    def _config(self) -> dict[str, Any]:
        return {
            "d": self.d, "bits": self.bits, "num_centroids": self.num_centroids, "normalize": self.normalize,
        }  # fmt: skip

    def _layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        if self.num_centroids is None or self.normalize is None:
            raise ValueError("no number of centroids, or no 'normalize', in the metadata")
        return {"centroids": ("F32", (self.num_centroids, self.d)), "values": ("F32", (1 << self.bits,))}

    def _tensors(self) -> dict[str, np.ndarray]:
        if self.centroids is None or self.values is None:
            return {}
        return {"centroids": self.centroids, "values": self.values}

    def _assign(self, tensors: dict[str, np.ndarray]) -> None:
        if (np.diff(tensors["values"]) < 0).any():
            raise ValueError("'values' do not increase")
        self.centroids, self.values = tensors["centroids"], tensors["values"]


def _unit(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    zero = ~points.any(1)
    if zero.any():
        raise ValueError(f"tokens[{rows[zero.argmax()]}] is zero; with normalize it needs a direction")
    return HOST.normalise(points)


def _levels(ordered: np.ndarray, bits: int, lloyd: bool) -> np.ndarray:
    """The values that stand for increasing numbers: medians of equal parts, then Lloyd's iterations."""
    values = np.quantile(ordered, (np.arange(1 << bits) + 0.5) / (1 << bits))
    if not lloyd:
        return values.astype(np.float32)
    sums = np.concatenate([[0], np.cumsum(ordered, dtype=np.float64)])
    ends = np.zeros((1 << bits) + 1, np.int64)
    for _ in range(_LLOYD):
        before = ends.copy()
        ends[1:-1] = np.searchsorted(ordered, (values[1:] + values[:-1]) / 2, side="right")
        ends[-1] = len(ordered)
        counts = np.diff(ends)
        values = np.where(counts > 0, np.diff(sums[ends]) / np.maximum(counts, 1), values)
        if (ends == before).all():
            break
    return np.maximum.accumulate(values.astype(np.float32))  # means of equal numbers may differ by rounding


def _entries(residuals: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The number of cuts below each value, uint8."""
    if len(cuts) > 15:
        return np.searchsorted(cuts, residuals).astype(np.uint8)
    entries = np.zeros(residuals.shape, np.uint8)
    for cut in cuts:
        entries += residuals > cut
    return entries


def _entries_there(home: Home, residuals: Any, cuts: np.ndarray) -> Any:
    """`_entries` in a home."""
    steps, xp = home.bring(cuts), home.xp
    if home.kind.name == "torch":
        return home.kind.cast(xp.searchsorted(steps, home.kind.dense(residuals)), U8)
    return home.kind.cast(xp.searchsorted(steps, residuals), U8)
