"""Codes: a flat scan of a quantizer's codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._results import Neighbors
from ._coded import CodedIndex
from ._home import HOST, Home, check_matrix, to_float32
from ._quantizer_files import quantizer_config
from .base import register

SAMPLE = 1 << 17  # vectors that a quantizer is trained on at most


@register
class Codes(CodedIndex):
    """All vectors as a quantizer's codes, in one scan.

    Parameters
    ----------
    quantizer : Quantizer
        Of `lutra.quant`, trained or not. The index takes it over: train it with the index, or before.
    metric : {'l2', 'ip', 'cosine'}, default 'l2'
        As in `Flat`. For cosine the vectors are normalised before they are coded.
    refine : {None, 'float32', 'float16', 'bfloat16', 'int8'}, default None
        Keep the vectors too, 4 d, 2 d or d bytes each ('int8': each row by its own scale), so that a search
        scores its best candidates again, exactly (in that precision).

    Attributes
    ----------
    refine_factor : int
        A search scores the best ``k * refine_factor`` by codes again; 0 ranks by codes alone. Default 4, or
        10 where a code has fewer than 4 bits a dimension; 0 without ``refine``.

    Notes
    -----
    Memory: the codes, the vectors of ``refine``, 4 bytes a vector for each row term that the quantizer has
    (squared norms for l2, factors of RaBitQ), and 8 for an id where ids are not 0, 1, 2, ...

    In large collections the signs of codes of `RotatedSQ` are scanned first, and what they leave in doubt is
    scored by all bits; a row is missed with small probability only (docs/ivf.md).

    On a GPU the codes are scanned by CUDA kernels, all bits at once, in fp32; quantizers but `PQ`,
    `OPQ` and `RQ` encode on the CPU.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((20_000, 32), dtype=np.float32)
    >>> index = lutra.index.Codes(lutra.quant.PQ(32, m=16, bits=4), refine="float16")
    >>> index.train(x)
    >>> index.add(x)
    >>> index.search(x[:2], k=1).ids.ravel()
    array([0, 1])
    """

    def __init__(self, quantizer: Any, metric: str = "l2", *, refine: str | None = None) -> None:
        d = getattr(quantizer, "d", None)
        if d is None or isinstance(quantizer, str):
            raise TypeError(f"quantizer must be one of lutra.quant, got {quantizer!r}")
        super().__init__(d, quantizer, metric, refine)

    @property
    def is_trained(self) -> bool:
        return self.quantizer.is_trained

    def train(self, x: Any, *, progress: bool | None = None) -> None:
        """Train the quantizer on a sample of vectors.

        Parameters
        ----------
        x : array, shape (n, d)
            Like those that will be added. At most 131,072 are used, drawn by a fixed seed.
        progress : bool or None
            A progress bar (tqdm): None shows one where it takes more than two seconds, on a terminal.

        Raises
        ------
        TypeError, ValueError
            As the quantizer's ``train``; an index that holds vectors, whose codes would lose their meaning.
        """
        native = check_matrix(x, "x", self.d)
        with self._changing():
            if self.ntotal:
                raise ValueError(f"the index holds {self.ntotal} coded vectors; train a new one")
            points = sampled(native, SAMPLE, 0, self._settle(native))
            self.quantizer.train(self._unit(points), progress=progress)
            self._codec = self._arena = self._searcher = None

    def search(
        self, q: Any, k: int = 10, *, filter: Any = None, refine_factor: int | None = None
    ) -> Neighbors:
        """The k best vectors for each query.

        Parameters
        ----------
        q, k, filter
            As in `Flat.search`.
        refine_factor : int, optional
            In place of the attribute. On CUDA k * refine_factor is at most 2048, or k where that is more.

        Returns
        -------
        scores, ids : arrays, shape (nq, k)
            As from `Flat.search`. Scores are those of the coded vectors, or exact where they are refined.

        Raises
        ------
        TypeError, ValueError
            As `Flat.search`; a ``refine_factor`` > 0 where the index keeps no vectors.

        Notes
        -----
        Cost: a query's tables, one pass over all codes, and k * refine_factor reads of a vector.
        """
        return self._answer(q, k, filter, refine_factor=refine_factor)

    def _search(self, q, k, keep, refine_factor):
        return self._find(q, k, keep, 1, self._factor(refine_factor))

    def _config(self):
        return {
            "quantizer": quantizer_config(self.quantizer), "metric": self.metric, "refine": self.refine,
            "refine_factor": self.refine_factor,
        }  # fmt: skip


def sampled(native: Any, most: int, seed: int, home: Home = HOST) -> Any:
    """At most so many rows of a checked matrix, as float32 in a home."""
    n = native.shape[0]
    if n <= most:
        return to_float32(home, native, "x")
    rows = np.sort(np.random.default_rng(seed).choice(n, most, replace=False))
    return to_float32(home, home.bring(native)[home.positions(rows)], "x", rows)
