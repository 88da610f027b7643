"""LPT: integer rows that stay integers while they train, by stochastic rounding."""

from __future__ import annotations

from torch import Tensor

from ._packed import Packed, at_random, check_seed, nearest
from ._stored import StoredEmbedding, StoredEmbeddingBag


class _LPT(Packed):
    """LPT: rows of int8, int4 or int2 that stay so while they train, by stochastic rounding.

    Parameters
    ----------
    bits : {8, 4, 2}, default 8
    seed : int, optional
        Of the rounding; default from torch's generator. A buffer.

    Notes
    -----
    There is no float copy of the table. A call decodes the rows that it needs. An optimizer of `lutra.optim`,
    to which the layer must be attached (``optimizer.attach(layer)``), decodes the touched rows, updates them
    in float32, and encodes each again with its new minimum and scale; values between two codes go up or down
    with the probability that keeps the mean, so that updates smaller than a step are not lost. Used
    unattached in training mode the layer raises a RuntimeError. Deterministic: the random bits are a hash of
    (seed, step, row, column).

    Memory, `nbytes`: ``dim * bits / 8`` bytes a row, and 8 (int8) or 4 (int4, int2) for scale and minimum.
    State of `lutra.optim.RowwiseAdagrad` adds 4, that of Adam 8 * dim. Becomes: 'int8', 'int4' or 'int2'
    (`compressed`).

    References
    ----------
    Xu et al., Agile and Accurate CTR Prediction Model Training for Massive-Scale Online Advertising Systems,
    SIGMOD 2021; the low-precision training of Li et al., AAAI 2023 (arXiv 2212.05735), with a step for each
    row.
    """

    def _method(self, bits: int = 8, seed: int | None = None) -> None:
        self._make(bits, check_seed(seed))
        self._given = {"bits": bits}
        self._start()

    def _encode(self, rows: Tensor, ids: Tensor) -> None:
        nearest(self, rows, ids)

    def _write(self, ids: Tensor, rows: Tensor, grads: Tensor, batch: int, seed: int) -> None:
        at_random(self, rows, ids, seed)


class LPTEmbedding(_LPT, StoredEmbedding):
    pass


class LPTEmbeddingBag(_LPT, StoredEmbeddingBag):
    pass
