"""ColumnTop: the largest of every column of a stream of rows, in bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _checks

_PART = 1 << 23  # scores that are looked at in one step
_BLOCK = 1 << 18  # and of these at a time


class ColumnTop:
    """The k largest scores of each column over a stream of rows, and the rows that they are of.

    Parameters
    ----------
    columns, k : int
    device : optional

    Attributes
    ----------
    scores : Tensor, shape (columns, k), float32
        Largest first; -inf where fewer rows have come.
    rows : Tensor, shape (columns, k), int64
        Numbers of rows in the stream, -1 where there is none. Of equal scores the first row stays and comes
        first.

    Notes
    -----
    A new score is of interest where it is above the k-th of its column so far: one comparison of all scores,
    and work for those few. After N rows about ``k / N`` of the new scores are. Until the columns are full
    ``topk`` of whole columns takes its place.

    Examples
    --------
    >>> import torch
    >>> from lutra.models.ffn_memory import ColumnTop
    >>> top = ColumnTop(2, k=2)
    >>> top.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> top.update(torch.tensor([[2.0, 5.0]]))
    >>> top.rows.tolist()
    [[1, 2], [0, 1]]
    """

    def __init__(self, columns: int, k: int, device: object = None) -> None:
        self.columns, self.k = _checks.integer("columns", columns, 1), _checks.integer("k", k, 1)
        self.scores = torch.full((columns, k), -torch.inf, device=device)
        self.rows = torch.full((columns, k), -1, dtype=torch.int64, device=device)
        self.seen = self.taken = 0

    @torch.no_grad()
    def update(self, scores: Tensor, keep: Tensor | None = None) -> None:
        """Take in rows.

        Parameters
        ----------
        scores : Tensor, shape (n, columns), floating point
        keep : Tensor, bool, shape (n,), optional
            Rows that count; the others only have numbers.

        Raises
        ------
        ValueError
            Another number of columns; a NaN among rows that count. What came before it may be taken in.
        """
        if scores.dim() != 2 or scores.shape[1] != self.columns:
            raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be (n, {self.columns})")
        scores = scores.detach()
        numbers = torch.arange(self.seen, self.seen + len(scores), device=scores.device)
        self.seen += len(scores)
        if keep is not None and not bool(keep.all()):
            scores, numbers = scores[keep], numbers[keep]
        most, begin = max(1, _PART // self.columns), 0
        while begin < len(scores):
            # Parts as long as all before: few of their scores are among the largest so far.
            end = min(len(scores), begin + min(most, max(self.k, self.taken)))
            self._take(scores[begin:end].float(), numbers[begin:end])
            self.taken += end - begin
            begin = end

    def _take(self, scores: Tensor, numbers: Tensor) -> None:
        last, some = self.scores[:, -1], max(1, _BLOCK // self.columns)
        full = self.taken >= self.k
        held = np.empty((some, self.columns), bool) if scores.is_cpu else None
        found, begin = [], 0
        for block in scores.split(some):  # what is read twice stays in the cache
            if not bool(block.sum().isfinite()) and bool(block.isnan().any()):
                row, column = block.isnan().nonzero()[0].tolist()
                raise ValueError(f"the score of row {int(numbers[begin + row])} in column {column} is NaN")
            if full and held is not None:  # NumPy finds bools 7 times as fast as torch
                above = np.greater(block.numpy(), last.numpy(), out=held[: len(block)])
                found.append(torch.from_numpy(np.flatnonzero(above) + begin * self.columns))
            elif full:
                found.append((block > last).reshape(-1).nonzero()[:, 0] + begin * self.columns)
            begin += len(block)
        if not full or sum(map(len, found)) > 2 * self.k * self.columns:
            self._whole(scores, numbers)
        elif found:
            self._few(scores, numbers, torch.cat(found))

    def _whole(self, scores: Tensor, numbers: Tensor) -> None:
        """By the order of integers that hold a score and, below it, how early its row is."""
        order = _ordered(scores.t().contiguous()) << 32
        order += torch.arange(len(numbers) - 1, -1, -1, device=order.device)
        at = len(numbers) - 1 - (order.topk(min(self.k, len(numbers))).values & 0xFFFFFFFF)
        self._merge(scores.t().gather(1, at), numbers[at])

    def _few(self, scores: Tensor, numbers: Tensor, flat: Tensor) -> None:
        """Put those at ``flat``, which are above the last of their columns, into their places."""
        row, column = flat // self.columns, flat % self.columns
        value = scores.reshape(-1)[flat]
        order = torch.sort(
            (column << 32) - _ordered(value), stable=True
        ).indices  # of equal ones the first row
        row, column, value = row[order], column[order], value[order]
        counts = torch.bincount(column, minlength=self.columns)
        rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[column]
        first = rank < self.k
        row, column, value, rank = row[first], column[first], value[first], rank[first]
        # Each new one goes behind those that are there and not smaller, and these move by what comes before.
        behind = (self.scores[column] >= value.unsqueeze(1)).sum(1)
        moved = torch.bincount(column * self.k + behind, minlength=self.columns * self.k)
        places = torch.arange(self.k, device=row.device) + moved.view(self.columns, self.k).cumsum(1)
        kept, place = places < self.k, behind + rank
        stays = (torch.arange(self.columns, device=row.device)[:, None] * self.k + places)[kept]
        inside = place < self.k
        goes = (column * self.k + place)[inside]
        for name, new in (("scores", value), ("rows", numbers[row])):
            held = getattr(self, name)
            after = torch.empty_like(held).view(-1)
            after[stays] = held[kept]
            after[goes] = new[inside]
            setattr(self, name, after.view_as(held))

    def _merge(self, scores: Tensor, rows: Tensor) -> None:
        """Later rows into what is there: a stable sort leaves the earlier of equal ones first."""
        scores, rows = torch.cat([self.scores, scores], 1), torch.cat([self.rows, rows], 1)
        scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
        self.scores, self.rows = scores[:, : self.k], rows.gather(1, order[:, : self.k])


def _ordered(scores: Tensor) -> Tensor:
    """Integers (of 32 bits, as int64) in the order of float32 scores."""
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
