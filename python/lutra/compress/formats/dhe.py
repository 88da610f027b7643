"""DHE: no table, but a network from the hashes of an id to its row."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ... import _checks, address, gather
from ..._arrays import is_torch
from ...address._hash_features import composition
from ...reference import hashes
from ._bags import at_least_one, bag_counts, same_padding
from .base import Array, Data, Format, Shape, _traced, check_ids, register

#: Multiply-adds that encoding may take; between 1 and 100 passes over the table follow from it.
_EFFORT = 1e11
_BATCH = 1024


@register
@dataclass(frozen=True)
class DHE(Format):
    """Deep hash embedding: ``k`` hash features of the id, then a network with Mish between its layers.

    Kang, Cheng, Yao, Yi, Chen, Hong, Chi, Learning to Embed Categorical Features without Embedding Tables,
    2021. The memory does not depend on the number of rows; a look-up costs the whole network: 2 k width + ...
    multiply-adds a row, thousands of times those of any table. It is meant to be trained from the start.

    Encoding a dense table fits the network with some passes of Adam (torch needed), at least one, and its
    last layer by least squares in the end. Expect little of it: rows that have no pattern in their ids have
    to be learned by heart, and the relative error stays near that of the mean row unless the network is about
    as large as the table. Counts weigh the rows.

    Parameters
    ----------
    k : int, default 1024
        Hash features.
    width : int, default 256
        Of the hidden layers.
    depth : int, default 2
        Hidden layers, at least one.
    buckets : int, default 1,000,000
    seed : int, default 0
        Of the hashes (`lutra.address.hash_features`), which are computed and not stored.
    """

    k: int = 1024
    width: int = 256
    depth: int = 2
    buckets: int = 1_000_000
    seed: int = 0

    name: ClassVar[str] = "dhe"
    layer: ClassVar[str] = "DHE"
    slow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.integer("k", self.k, 1, 1 << 16)
        _checks.integer("width", self.width, 1)
        _checks.integer("depth", self.depth, 1, 64)
        _checks.integer("buckets", self.buckets, 2, (1 << 31) - 1)
        _checks.integer("seed", self.seed)

    def widths(self, dim: int) -> list[int]:
        return [self.k, *[self.width] * self.depth, dim]

    def arrays(self, shape: Shape) -> dict[str, Array]:
        widths, out = self.widths(shape[1]), {}
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            out[f"weight_{i}"] = Array((a, b))
            out[f"bias_{i}"] = Array((b,))
        return out

    @classmethod
    def fit(cls, shape: Shape, nbytes: int, dtype: str = "float32") -> DHE | None:
        """The widest network with twice as many features as it is wide, and at most 1,024."""
        low, high = 0, 1 << 16
        while low < high:
            middle = (low + high + 1) // 2
            if cls(min(2 * middle, 1024), middle).nbytes(shape, dtype) <= nbytes:
                low = middle
            else:
                high = middle - 1
        return cls(min(2 * low, 1024), low) if low else None

    # ---------------------------------------------------------------- data
    def initial(self, shape: Shape, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        data: Data = {}
        for name, a in self.arrays(shape).items():
            if name.startswith("bias"):
                data[name] = np.zeros(a.shape, np.float32)
            else:
                data[name] = rng.standard_normal(a.shape, dtype=np.float32)
                data[name] *= np.float32((2 / a.shape[0]) ** 0.5)
        spread = self.rows(data, shape, np.arange(min(max(shape[0], 1), 256))).std()
        data[f"weight_{self.depth}"] /= max(spread, 1e-6)
        return data

    def encode(
        self, table: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, progress: bool | None = None
    ) -> Data:
        try:
            import torch
        except ImportError:
            raise ImportError("format 'dhe' is fitted with torch: pip install 'lutra[torch]'") from None
        from ...index._progress import Progress

        rows, dim = table.shape
        data = {k: torch.from_numpy(v) for k, v in self.initial(table.shape, seed).items()}
        last = f"weight_{self.depth}"
        goal = torch.from_numpy(np.ascontiguousarray(table, np.float32))
        scale = float(goal.square().mean().sqrt()) or 1.0
        data[last] *= 0.1 * scale
        data[f"bias_{self.depth}"] = goal.mean(0) if rows else torch.zeros(dim)
        weights = None
        if counts is not None:
            relative = counts / max(counts.mean(), 1e-12)
            weights = torch.from_numpy(relative.astype(np.float32)).clamp(0.01, 100)
        size = sum(v.numel() for v in data.values())
        passes = int(min(max(_EFFORT / (3 * size * max(rows, 1)), 1), 100))
        parameters = [v.requires_grad_(True) for v in data.values()]
        optimizer = torch.optim.Adam(parameters, lr=4e-3)
        steps = passes * -(-rows // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, max(steps, 1) + 1)
        order = torch.Generator().manual_seed(seed)
        ids = torch.arange(rows)
        with Progress(steps, "dhe", progress) as bar:
            for _ in range(passes):
                for batch in torch.randperm(rows, generator=order).split(_BATCH):
                    error = (self.lookup(data, table.shape, ids[batch]) - goal[batch]).square().mean(1)
                    loss = (error if weights is None else error * weights[batch]).mean() / scale**2
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.tick()
        found = {k: v.detach() for k, v in data.items()}
        if rows:
            self._solve_last(found, goal, weights)
        return {k: v.numpy() for k, v in found.items()}

    def _solve_last(self, data: dict[str, Any], goal: Any, weights: Any) -> None:
        """The last layer by (weighted) ridge regression of the rows on what the layers before give."""
        import torch

        gram = torch.zeros(self.width + 1, self.width + 1, dtype=torch.float64)
        right = torch.zeros(self.width + 1, goal.shape[1], dtype=torch.float64)
        for ids in torch.arange(len(goal)).split(4 * _BATCH):
            x = self._hidden(data, self._features(ids))
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            scaled = x if weights is None else x * weights[ids, None]
            gram += (scaled.T @ x).double()
            right += (scaled.T @ goal[ids]).double()
        ridge = 1e-4 * gram.diagonal().mean()
        solved = torch.linalg.solve(gram + ridge * torch.eye(self.width + 1, dtype=torch.float64), right)
        data[f"weight_{self.depth}"] = solved[:-1].float().contiguous()
        data[f"bias_{self.depth}"] = solved[-1].float().contiguous()

    # ---------------------------------------------------------------- rows
    def rows(self, data: Data, shape: Shape, ids: np.ndarray) -> np.ndarray:
        x = hashes.hash_features(np.asarray(ids), self.k, buckets=self.buckets, seed=self.seed)
        for i in range(self.depth):
            x = _linear(data, i, x)
            x = x * np.tanh(np.logaddexp(0, x))
        return _linear(data, self.depth, x)

    def _hidden(self, data: Data, x: Any) -> Any:
        import torch

        x = x.to(data["weight_0"].dtype)
        for i in range(self.depth):
            x = torch.nn.functional.mish(torch.addmm(data[f"bias_{i}"], x, data[f"weight_{i}"]))
        return x

    def lookup(self, data: Data, shape: Shape, ids: Any) -> Any:
        x = self._hidden(data, composition(ids, self.k, self.buckets, self.seed))
        return x @ data[f"weight_{self.depth}"] + data[f"bias_{self.depth}"]

    def gather(self, data: Data, shape: Shape, ids: Any, sparse: bool = False) -> Any:
        ids = check_ids(ids, shape[0])
        if not is_torch(ids):
            return self.rows(data, shape, ids)
        hidden = self._hidden(data, self._features(ids))
        return hidden @ data[f"weight_{self.depth}"] + data[f"bias_{self.depth}"]

    def _features(self, ids: Any) -> Any:
        return address.hash_features(ids, self.k, buckets=self.buckets, seed=self.seed)

    def bag(
        self, data: Data, shape: Shape, ids: Any, offsets: Any = None, weights: Any = None, *,
        mode: str = "sum", padding_idx: int | None = None, include_last_offset: bool = False,
        sparse: bool = False,
    ) -> Any:  # fmt: skip
        if mode not in ("sum", "mean") or not is_torch(ids) or _fixed(ids):
            return super().bag(
                data, shape, ids, offsets, weights, mode=mode, padding_idx=padding_idx,
                include_last_offset=include_last_offset, sparse=sparse,
            )  # fmt: skip
        import torch

        # Each id once; the last layer, which is linear, once a bag.
        padding = same_padding(padding_idx, shape[0])
        known, place = torch.unique(check_ids(ids.reshape(-1), shape[0]), return_inverse=True)
        hidden, pad = self._hidden(data, self._features(known)), None
        if padding is not None:
            found = (known == padding).nonzero()
            pad = int(found[0]) if len(found) else None
        options: dict[str, Any] = {"padding_idx": pad, "include_last_offset": include_last_offset}
        place = place.reshape(ids.shape)
        if offsets is not None and offsets.dtype != place.dtype:
            offsets = offsets.long()
        total = gather.bag(hidden, place, offsets, weights, mode=mode, **options)
        count = bag_counts(place, offsets, weights, total, pad, include_last_offset)
        if mode == "mean":
            count = count / at_least_one(count)
        return total @ data[f"weight_{self.depth}"] + count * data[f"bias_{self.depth}"]

    def resize(
        self, data: Data, shape: Shape, values: np.ndarray, rows: int, seed: int = 0
    ) -> tuple[Format, Data]:
        """Fewer rows need no change; new values are fitted anew, with the old rows."""
        if not len(values):
            return self, dict(data)
        return super().resize(data, shape, values, rows, seed)


def _linear(data: Data, i: int, x: np.ndarray) -> np.ndarray:
    return x @ data[f"weight_{i}"].astype(np.float32) + data[f"bias_{i}"].astype(np.float32)


def _fixed(ids: Any) -> bool:
    """Whether sizes may not depend on values: on a GPU, where it would wait, and where ids are traced."""
    import torch

    return not ids.is_cpu or torch.compiler.is_compiling() or _traced(ids)
