"""Mixed dimensions: thinner rows for rarer ids."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ... import _checks, gather
from ..._arrays import is_torch
from ._bags import at_least_one, bag_counts, principal, row_weights, same_padding
from .base import Array, Data, Format, Shape, _traced, check_ids, register


@register
@dataclass(frozen=True)
class MixedDim(Format):
    """Groups of rows by frequency; group f has rows of its own dimension d_f and a projection (d_f, dim).

    Group 0 holds the most frequent ids; each further group has ``growth`` times as many rows, and
    ``d_f = dim (n_0 / n_f) ** alpha`` columns, at least one (Ginart, Naumov, Mudigere, Yang, Zou, Mixed
    Dimension Embeddings with Application to Memory-Efficient Recommendation Systems, 2019). A group with all
    dim columns has no projection. ``position`` holds each id's place in the order of frequency, 2 or 4 bytes
    an id, unless ``ordered`` says that ids are in that order.

    Encoded by a singular value decomposition of each group (weighed by counts); without counts, ids are taken
    as ordered by frequency, as those of tokenizers roughly are.

    Parameters
    ----------
    groups : int, default 4
    growth : int, default 8
        Rows of a group by those of the group before.
    alpha : float, default 0.3
        0: all groups have dim columns. The larger, the thinner are the rare.
    ordered : bool, default False
        Ids are in the order of frequency, the most frequent first.
    sizes, widths : tuples of int, optional
        Rows and columns of each group, in the place of ``groups``, ``growth`` and ``alpha``: what a search
        for dimensions has found (`lutra.nn.AutoDimEmbedding`, `lutra.nn.AutoSrhEmbedding`). Both or none.
    """

    groups: int = 4
    growth: int = 8
    alpha: float = 0.3
    ordered: bool = False
    sizes: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None

    name: ClassVar[str] = "mixed"
    layer: ClassVar[str] = "MixedDim"

    def __post_init__(self) -> None:
        _checks.integer("groups", self.groups, 1, 64)
        _checks.integer("growth", self.growth, 1)
        if not 0 <= float(self.alpha) <= 8:
            raise ValueError(f"alpha must lie in [0, 8], got {self.alpha!r}")
        if not isinstance(self.ordered, bool):
            raise TypeError(f"ordered must be a bool, got {type(self.ordered).__qualname__}")
        if self.sizes is None and self.widths is None:
            return
        for name, low in (("sizes", 0), ("widths", 1)):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple) or not numbers:
                raise ValueError(
                    f"sizes and widths must both be tuples of int, or None; {name} is {numbers!r}"
                )
            for n in numbers:
                _checks.integer(name, n, low)
        if len(self.sizes) != len(self.widths):  # type: ignore[arg-type]
            raise ValueError(f"sizes and widths must be of one length, got {self.sizes} and {self.widths}")
        object.__setattr__(self, "groups", len(self.sizes))  # type: ignore[arg-type]

    def starts(self, rows: int) -> list[int]:
        """Where the groups begin in the order of frequency, and ``rows``."""
        if rows < self.groups:
            raise ValueError(f"groups is {self.groups}; it must be at most the number of rows, {rows}")
        if self.sizes is not None:
            if sum(self.sizes) != rows:
                raise ValueError(
                    f"sizes are {self.sizes}, in sum {sum(self.sizes)}; the table has {rows} rows"
                )
            return [sum(self.sizes[:f]) for f in range(len(self.sizes) + 1)]
        parts = [self.growth**f for f in range(self.groups)]
        total, out, sum_ = sum(parts), [0], 0
        for f, part in enumerate(parts):
            sum_ += part  # every group has a row
            out.append(min(max(rows * sum_ // total, out[-1] + 1), rows - (self.groups - 1 - f)))
        return out

    def dims(self, shape: Shape) -> list[int]:
        """Columns of each group."""
        if self.widths is not None:
            if max(self.widths) > shape[1]:
                raise ValueError(f"widths are {self.widths}; each must be at most the dimension, {shape[1]}")
            return list(self.widths)
        starts = self.starts(shape[0])
        sizes = [b - a for a, b in itertools.pairwise(starts)]
        return [min(shape[1], max(1, round(shape[1] * (sizes[0] / n) ** self.alpha))) for n in sizes]

    def arrays(self, shape: Shape) -> dict[str, Array]:
        rows, dim = shape
        starts, out = self.starts(rows), {}
        for f, d in enumerate(self.dims(shape)):
            out[f"table_{f}"] = Array((starts[f + 1] - starts[f], d))
            if d < dim:
                out[f"projection_{f}"] = Array((d, dim))
        if not self.ordered:
            out["position"] = Array((rows,), "int16" if rows <= 1 << 15 else "int32", False)
        return out

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> MixedDim | None:
        groups = min(4, shape[0])
        for hundredths in range(301) if groups else ():
            mixed = cls(groups, alpha=hundredths / 100)
            if mixed.nbytes(shape, dtype) <= nbytes:
                return mixed
        return None

    # ---------------------------------------------------------------- encode
    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        rows = len(table)
        order = np.arange(rows) if counts is None or self.ordered else np.argsort(-counts, kind="stable")
        return self._encode(table, order, row_weights(counts, rows))

    def _encode(self, table: np.ndarray, order: np.ndarray, weights: np.ndarray) -> Data:
        wanted = self.arrays(table.shape)
        starts, dim = self.starts(len(table)), table.shape[1]
        data = {}
        for f, d in enumerate(self.dims(table.shape)):
            members = order[starts[f] : starts[f + 1]]
            x = table[members]
            if d < dim:
                basis = principal(x, weights[members], d)
                x = (x.astype(np.float64) @ basis.T).astype(np.float32)
                data[f"projection_{f}"] = basis.astype(np.float32)
            data[f"table_{f}"] = np.ascontiguousarray(x, np.float32)
        if not self.ordered:
            data["position"] = np.argsort(order).astype(wanted["position"].dtype)
        return data

    def initial(self, shape: Shape, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        data = {}
        for name, a in self.arrays(shape).items():
            if name == "position":
                data[name] = np.arange(shape[0]).astype(a.dtype)
            else:
                data[name] = rng.standard_normal(a.shape, dtype=np.float32)
                if name.startswith("projection"):
                    data[name] /= np.float32(a.shape[0] ** 0.5)
        return data

    # ---------------------------------------------------------------- rows
    def _positions(self, data: Data, ids: Any) -> Any:
        if self.ordered:
            return ids
        position = data["position"][ids]
        return position.long() if is_torch(position) else position.astype(np.int64)

    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        at, starts = self._positions(data, ids), self.starts(shape[0])
        out = np.zeros((len(ids), shape[1]), np.float32)
        for f in range(self.groups):
            here = (at >= starts[f]) & (at < starts[f + 1])
            thin = data[f"table_{f}"][at[here] - starts[f]].astype(np.float32)
            projection = data.get(f"projection_{f}")
            out[here] = thin if projection is None else thin @ projection.astype(np.float32)
        return out

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        import torch

        at, starts = self._positions(data, ids), self.starts(shape[0])
        out = torch.zeros(len(ids), shape[1], dtype=data["table_0"].dtype, device=ids.device)
        for f in range(self.groups):
            here = (at >= starts[f]) & (at < starts[f + 1])
            # of one shape whatever the ids are, so that nothing waits for a device
            thin = data[f"table_{f}"][(at - starts[f]).clamp(0, starts[f + 1] - starts[f] - 1)]
            projection = data.get(f"projection_{f}")
            out = torch.where(here[:, None], thin if projection is None else thin @ projection, out)
        return out

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        ids = ids.reshape(-1)
        if _fixed(ids):
            return self.lookup(data, shape, check_ids(ids, shape[0]))
        return self.bag(data, shape, ids.reshape(-1, 1), sparse=sparse)

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        # Rows one by one for maxima, for what is an error, and where sizes may not depend on values.
        if mode not in ("sum", "mean") or (weights is not None and mode != "sum") or _fixed(ids):
            return super().bag(
                data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset, sparse=sparse,
            )  # fmt: skip
        padding = same_padding(padding_idx, shape[0])
        bags, length = gather._bag._layout(ids, offsets, include_last_offset)
        flat = check_ids(ids.reshape(-1), shape[0])
        ends = _ends(flat, offsets, bags, length, include_last_offset)
        at, starts = self._positions(data, flat), self.starts(shape[0])
        out = None
        for f in range(self.groups):
            # The entries of this group, in order, and where each bag's begin among them.
            here = (at >= starts[f]) & (at < starts[f + 1])
            if padding is not None:
                here &= flat != padding
            chosen, begins = _select(here, ends)
            thin = gather.bag(
                data[f"table_{f}"], at[chosen] - starts[f], begins,
                None if weights is None else weights.reshape(-1)[chosen], include_last_offset=True,
                sparse_grad=sparse,
            )  # fmt: skip
            projection = data.get(f"projection_{f}")
            part = thin if projection is None else thin @ projection
            out = part if out is None else out + part
        if mode == "mean":
            out = out / at_least_one(bag_counts(ids, offsets, None, out, padding, include_last_offset))
        return out

    # ---------------------------------------------------------------- the rest
    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Old rows keep their order of frequency, new ones are the rarest; groups are divided anew."""
        old = np.concatenate([np.asarray(b, np.float32) for b in self.decode(data, shape)])[:rows]
        table = np.concatenate([old, values.astype(np.float32)])
        order = np.argsort(self._positions(data, np.arange(shape[0]))[: len(old)], kind="stable")
        order = np.concatenate([order, np.arange(len(old), len(table))])
        chosen = self
        if self.sizes is not None:  # groups keep what is left of their rows; new ones go to the last
            ends = np.searchsorted(np.sort(self._positions(data, np.arange(len(old)))), self.starts(shape[0]))
            ends[-1] = len(table)
            chosen = replace(self, sizes=tuple(int(n) for n in np.diff(ends)))
        return chosen, chosen._encode(table, order, np.ones(len(table)))

    def logits(self, data: Data, shape: Shape, hidden: Any) -> Any:
        import torch

        parts = []
        for f in range(self.groups):
            projection = data.get(f"projection_{f}")
            thin = hidden if projection is None else hidden @ projection.T
            parts.append(thin @ data[f"table_{f}"].T)
        logits = torch.cat(parts, 1)
        return logits if self.ordered else logits[:, data["position"].long()]


def _fixed(ids: Any) -> bool:
    """Whether ids are on a GPU, or traced: choosing a group's entries would wait, or break the graph."""
    if not is_torch(ids):
        return False
    import torch

    return not ids.is_cpu or torch.compiler.is_compiling() or _traced(ids)


def _ends(flat: Any, offsets: Any, bags: int, length: int, include_last_offset: bool) -> Any:
    """bags + 1 places among the entries: where bags begin, and where the last one ends."""
    n = flat.shape[0]
    if is_torch(flat):
        import torch

        if offsets is None:
            return torch.arange(bags + 1) * length
        _check_offsets(offsets, n)
        offsets = offsets.long()
        return offsets if include_last_offset else torch.cat([offsets, offsets.new_full((1,), n)])
    if offsets is None:
        return np.arange(bags + 1) * length
    _check_offsets(offsets, n)
    offsets = offsets.astype(np.int64)
    return offsets if include_last_offset else np.append(offsets, n)


def _check_offsets(offsets: Any, n: int) -> None:
    from ...reference.gather import check_ids as check

    offsets = offsets.detach().numpy() if is_torch(offsets) else offsets
    check(np.zeros(n, np.int64), offsets, 1)


def _select(here: Any, ends: Any) -> tuple[Any, Any]:
    """Positions where ``here`` holds, and how many of them lie before each of ``ends``."""
    if is_torch(here):
        import torch

        before = torch.zeros(here.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(here, 0, out=before[1:])
        return here.nonzero().squeeze(1), before[ends]
    before = np.zeros(len(here) + 1, np.int64)
    np.cumsum(here, out=before[1:])
    return np.flatnonzero(here), before[ends]
