"""Shards: one collection on several GPUs, or anywhere else."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import _checks
from .._results import Neighbors
from ._home import HOST, Home, adopt, check_ids, check_matrix, deliver, home_of
from ._load import load
from ._tokens import as_tokens
from .base import Index
from .multivector import MultiVector

_DESCENDING = ("ip", "cosine")


class Shards:
    """A collection cut into indexes of one kind, each on a device of its own, searched as one.

    Parameters
    ----------
    index : Index
        Trained where its kind needs that, empty or filled. It is taken over: its vectors are spread evenly,
        in the order of their addition, and its training is copied to every device.
    devices : list of str
        'cuda:0', 'cuda:1', ..., or 'cpu'; one shard each. A device may be named several times.

    Attributes
    ----------
    shards : list of Index
        Their search parameters may be set (``for shard in shards.shards: shard.nprobe = 8``).

    Notes
    -----
    A search sends the queries to all devices, which work at the same time, and merges their results where the
    queries are: k scores and ids of each shard. On GPUs nothing waits for a device, so long as the queries
    are on one. Results are those of one index with all vectors; of equal scores those of the shard that
    comes first in ``shards`` come first. Of a `MultiVector` each shard ranks as many candidates as one index
    would, so that more are found.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> x = np.random.default_rng(0).standard_normal((1000, 8), dtype=np.float32)
    >>> flat = lutra.index.Flat(8, "l2")
    >>> flat.add(x)
    >>> shards = lutra.index.Shards(flat, ["cpu", "cpu"])
    >>> shards.search(x[:2], k=1).ids.ravel()
    array([0, 1])
    """

    def __init__(self, index: Index, devices: list[Any]) -> None:
        if not isinstance(index, Index):
            raise TypeError(f"index must be a lutra index, got {index!r}")
        if isinstance(devices, str) or not len(devices):
            raise TypeError(f"devices must be a list of one device at least, got {devices!r}")
        if not index.is_trained:
            raise ValueError(f"this {type(index).__name__} is not trained: call train(x) with a sample first")
        index.to("cpu")
        ids, count = index.ids, len(devices)
        edges = [len(ids) * i // count for i in range(count + 1)]
        self.shards: list[Index] = []
        for i, device in enumerate(devices):
            last = i == count - 1
            shard = index if last else copy.deepcopy(index)
            shard.remove_ids(np.concatenate([ids[: edges[i]], ids[edges[i + 1] :]]))
            self.shards.append(shard.to(device))
        self.d, self.metric = index.d, index.metric

    @classmethod
    def _of(cls, shards: list[Index]) -> Shards:
        made = cls.__new__(cls)
        made.shards, made.d, made.metric = shards, shards[0].d, shards[0].metric
        return made

    @property
    def ntotal(self) -> int:
        """Number of vectors in all shards."""
        return sum(shard.ntotal for shard in self.shards)

    def __len__(self) -> int:
        return self.ntotal

    @property
    def devices(self) -> list[str]:
        """Where each shard lives."""
        return [shard.device for shard in self.shards]

    @property
    def ids(self) -> np.ndarray:
        """The ids of all vectors, shard by shard."""
        return np.concatenate([shard.ids for shard in self.shards])

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def __repr__(self) -> str:
        kind = type(self.shards[0]).__name__
        return f"Shards({kind}, ntotal={self.ntotal}, devices={self.devices})"

    def search(self, q: Any, k: int = 10, *, filter: Any = None, **options: Any) -> Neighbors:
        """The k best vectors for each query; ``filter`` and ``options`` as in the index's own `search`."""
        k = _checks.integer("k", k, 1)
        filled = [shard for shard in self.shards if shard.ntotal]
        if not filled:
            return self.shards[0].search(q, k, filter=filter, **options)  # which says why not
        if isinstance(
            filled[0], MultiVector
        ):  # its queries have several forms; their library gets all results
            found = [tuple(shard.search(q, k, filter=filter, **options)) for shard in filled]
            target = home_of(found[0][0], "q")
            with target.here():
                return Neighbors(*merged(target, found, k, self.metric))
        native = check_matrix(q, "q", self.d)
        # First all queries to their devices, so that none waits for the results of another.
        homes = [shard._home or HOST for shard in filled]
        parts = [native if home is HOST else home.bring(native) for home in homes]
        found = [shard.search(part, k, filter=filter, **options) for shard, part in zip(filled, parts)]
        target = home_of(native, "q")
        brought = [tuple(target.bring(adopt(a, "result")) for a in result) for result in found]
        with target.here():
            return Neighbors(*deliver(target, merged(target, brought, k, self.metric), q))

    def add(self, x: Any, ids: Any = None, **options: Any) -> None:
        """Add vectors, as the index's own ``add``: in pieces, so that all shards come to hold as many."""
        if isinstance(self.shards[0], MultiVector):
            self._add_documents(x, ids, **options)
            return
        native = check_matrix(x, "x", self.d)
        for shard, (i, j), new in self._pieces(native.shape[0], ids):
            shard.add(native[i:j], new, **options)

    def _add_documents(self, x: Any, ids: Any, ptr: Any = None, mask: Any = None, **options: Any) -> None:
        tokens, ptr = as_tokens(x if ptr is None else (x, ptr), self.d, mask)
        ends = HOST.bring(ptr)
        for shard, (i, j), new in self._pieces(len(ends) - 1, ids):
            part = tokens[int(ends[i]) : int(ends[j])]
            shard.add((part, ends[i : j + 1] - ends[i]), new, **options)

    def _pieces(self, count: int, ids: Any) -> Iterator[tuple[Any, tuple[int, int], np.ndarray]]:
        """The shards that an addition goes to, which part of it each gets, and the ids of that."""
        if ids is None:
            following = max(shard._ids.next for shard in self.shards)
            new = np.arange(following, following + count)
        else:
            new = np.array(check_ids(ids), np.int64)
            if new.shape != (count,):
                raise ValueError(f"ids has shape {new.shape}; x has {count} rows, one id is needed for each")
            for shard in self.shards:
                known = np.flatnonzero(shard._ids.positions(new) >= 0)
                if len(known):
                    raise ValueError(
                        f"ids[{known[0]}] is {int(new[known[0]])}, which is in the index; remove_ids it first"
                    )
        each = -(-(self.ntotal + count) // len(self.shards))
        start = 0
        for i, shard in enumerate(self.shards):
            room = count - start if i == len(self.shards) - 1 else max(0, each - shard.ntotal)
            stop = min(count, start + room)
            if stop > start:
                yield shard, (start, stop), new[start:stop]
            start = stop

    def remove_ids(self, ids: Any) -> int:
        """Remove vectors and return how many there were, as `Index.remove_ids`."""
        wanted = check_ids(ids)
        return sum(shard.remove_ids(wanted) for shard in self.shards)

    def reconstruct(self, ids: Any) -> Any:
        """The stored vectors of some ids, as the index's own ``reconstruct``, on the host."""
        wanted = check_ids(ids)
        flat = np.atleast_1d(wanted)
        ragged = isinstance(self.shards[0], MultiVector)
        out: Any = [None] * len(flat) if ragged else np.empty((len(flat), self.d), np.float32)
        there = np.zeros(len(flat), bool)
        for shard in self.shards:
            rows = np.flatnonzero(shard._ids.positions(flat) >= 0)
            if len(rows):
                there[rows] = True
                found = shard.reconstruct(flat[rows])
                if not ragged:
                    out[rows] = found
                    continue
                for row, tokens in zip(rows, found):
                    out[row] = tokens
        if not there.all():
            first = int((~there).argmax())
            raise IndexError(f"ids[{first}] is {int(flat[first])}, which is not in the index")
        return out if wanted.ndim else out[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the shards to files ``0000.safetensors``, ... in a folder, made where it is not there."""
        os.makedirs(path, exist_ok=True)
        for i, shard in enumerate(self.shards):
            shard.save(os.path.join(path, f"{i:04d}.safetensors"))
        for name in os.listdir(path):
            number, _, end = name.partition(".")
            if end == "safetensors" and number.isdigit() and int(number) >= len(self.shards):
                os.unlink(os.path.join(path, name))  # of an earlier save of more shards

    @classmethod
    def load(cls, path: str | os.PathLike[str], devices: list[Any]) -> Shards:
        """Load what `save` wrote, each shard to a device; the devices are taken in turn."""
        names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
        if not names:
            raise ValueError(f"{os.fsdecode(path)}: there are no shards in this folder")
        return cls._of(
            [load(os.path.join(path, name), device=devices[i % len(devices)]) for i, name in enumerate(names)]
        )


def merged(home: Home, found: list[Any], k: int, metric: str) -> tuple[Any, Any]:
    """The k best of several results (scores, ids) in a home; equal scores in the order of the results."""
    if len(found) == 1:
        return found[0][0], found[0][1]
    xp = home.xp
    scores, ids = xp.concatenate([s for s, _ in found], 1), xp.concatenate([i for _, i in found], 1)
    key = -scores if metric in _DESCENDING else scores
    key = xp.where(xp.isnan(scores), -float("inf"), key)  # a NaN comes first, as from a GPU
    missing = ids < 0
    if home.kind.name == "torch":
        order = xp.argsort(key, dim=1, stable=True)
        order = order.gather(1, xp.argsort(missing.gather(1, order).to(xp.int8), dim=1, stable=True))[:, :k]
        return scores.gather(1, order), ids.gather(1, order)
    if home.kind is HOST.kind:
        order = np.lexsort((key, missing), axis=1)[:, :k]
    else:  # CuPy's lexsort takes one row at a time, and its argsort is not stable
        order = _stable_of_cupy(xp, key, missing)[:, :k]
    return xp.take_along_axis(scores, order, 1), xp.take_along_axis(ids, order, 1)


def _stable_of_cupy(xp: Any, key: Any, missing: Any) -> Any:
    """The stable order of float32 keys, what is missing last: as integers that grow with them."""
    bits = (key + 0.0).view(xp.int32).astype(xp.int64)
    bits = xp.where(bits < 0, -(bits & 0x7FFFFFFF), bits) + xp.where(missing, 1 << 33, 0)
    width = key.shape[1]
    return xp.argsort(bits * width + xp.arange(width), axis=1)
