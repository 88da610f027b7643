"""MemoryBank: keys and values that attention retrieves from."""

from __future__ import annotations

import copy
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks
from .._results import Neighbors
from ..index import _files, factory
from ..scan import knn, knn_screened, quantize_int8
from ..torch_ops.library import register
from ._memory_bank_files import KIND, NAMES, bank_config, bank_of, bank_tensors

_METRICS = {"ip": 0, "cosine": 1}
_PAYS_AFTER = 128  # queries over which a scan of 8-bit codes saves what making the codes costs
_PART = 1 << 26  # scores that are written at a time where there is no kernel


class MemoryBank:
    """Keys and values of attention heads, and the search for the keys that are nearest to a query.

    Parameters
    ----------
    num_heads : int
        Heads of the keys and values; query heads may be a multiple (grouped queries).
    head_dim : int
        Width of the keys.
    value_dim : int, optional
        Width of the values; default head_dim.
    metric : {'cosine', 'ip'}, default 'cosine'
        By what memories are chosen: ``'cosine'`` in Extended Mind Transformers, ``'ip'`` in Memorizing
        Transformers. The attention weights of those chosen come from inner products with either.
    index : str, default 'exact'
        ``'exact'``: every memory is compared; on the CPU by a scan of 8-bit codes, which misses none, once
        128 queries have asked for it. Else a text for `lutra.index.factory` such as ``'IVF1024,Flat'`` or
        ``'HNSW32'``: an index for each head, trained with all keys at the first search. CPU only.
    device, dtype : optional
        Of keys and values: float32 (default), float16, bfloat16 or float64.

    Attributes
    ----------
    keys, values : Tensor, shape (num_heads, n, head_dim) and (num_heads, n, value_dim)
        Views of what is stored.

    Raises
    ------
    TypeError, ValueError
        An argument of another type, out of range or unknown.

    Notes
    -----
    What is in a bank is data: gradients flow through a retrieved memory to the query, not into the bank, and
    a bank is in no ``state_dict``. Memory: the keys and values, ``4 n`` bytes a head of norms, and ``head_dim
    + 8`` bytes a key for the codes (or the index). Adding grows by half, so that many small additions cost
    linear time; codes are made anew after an addition, once 128 queries have come.

    Any number of threads may search at once; add and clear only while none does.

    References
    ----------
    Klett and Ahle, Extended Mind Transformers, 2024, arXiv 2406.02332. Wu, Rabe, Hutchins and Szegedy,
    Memorizing Transformers, 2022, arXiv 2203.08913.

    Examples
    --------
    >>> import torch, lutra.nn
    >>> bank = lutra.nn.MemoryBank(2, 4)
    >>> keys = torch.eye(4).repeat(2, 1, 1)
    >>> bank.add(keys, 10 * keys)
    >>> bank.search(torch.eye(4)[1:2].repeat(2, 1, 1), k=1).ids.tolist()
    [[[1]], [[1]]]
    """

    def __init__(
        self, num_heads: int, head_dim: int, value_dim: int | None = None, *, metric: str = "cosine",
        index: str = "exact", device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.num_heads = _checks.integer("num_heads", num_heads, 1)
        self.head_dim = _checks.integer("head_dim", head_dim, 1)
        self.value_dim = _checks.integer("value_dim", head_dim if value_dim is None else value_dim, 1)
        _checks.choice("metric", metric, _METRICS)
        if not isinstance(index, str):
            raise TypeError(f"index must be a str, got {type(index).__qualname__}")
        self.metric, self.index = metric, index
        if index != "exact":
            factory(index, self.head_dim, metric)  # raises what is wrong with the text, now
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in NAMES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, NAMES))}; got {dtype}")
        options = {"device": device, "dtype": dtype}
        # views of storage with room behind them
        self.keys = torch.empty(num_heads, 0, self.head_dim, **options)
        self.values = torch.empty(num_heads, 0, self.value_dim, **options)
        self.norms = torch.empty(num_heads, 0, device=device, dtype=torch.float32)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self.handle = next(_numbers)
        _banks[self.handle] = self
        self._forget()

    def _forget(self) -> None:
        """What searches have made."""
        self._queries = 0
        self._screens: list[Any] | None = None
        self.indexes: list[Any] | None = None

    # ---------------------------------------------------------------- the collection
    def __len__(self) -> int:
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the keys and values are."""
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and norms, and of what searches have made, without room to grow."""
        made = sum(a.nbytes for s in self._screens or () for a in s)
        made += sum(index.nbytes for index in self.indexes or ())
        return self.keys.nbytes + self.values.nbytes + self.norms.nbytes + made

    def __repr__(self) -> str:
        return (
            f"MemoryBank({self.num_heads}, {self.head_dim}, {self.value_dim}, metric={self.metric!r}, "
            f"index={self.index!r}, n={len(self)}, dtype={self.dtype}, device={self.device})"
        )

    @torch.no_grad()
    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add memories behind those there are; they are copied.

        Parameters
        ----------
        keys, values : Tensor, shape (num_heads, m, head_dim) and (num_heads, m, value_dim)
            Or with a batch in front, (batch, num_heads, m, ...): the items one after the other.

        Raises
        ------
        TypeError
            No tensors of floating point.
        ValueError
            Another width, number of heads or length; NaN or infinities (the place is named), also where they
            come from rounding to the bank's type. The bank is then unchanged.
        """
        new = []
        for name, given, width in (("keys", keys, self.head_dim), ("values", values, self.value_dim)):
            if not isinstance(given, Tensor) or not given.is_floating_point():
                what = given.dtype if isinstance(given, Tensor) else type(given).__qualname__
                raise TypeError(f"{name} must be a floating point tensor, got {what}")
            if given.dim() == 4:
                given = given.transpose(0, 1).flatten(1, 2)
            if given.dim() != 3 or given.shape[0] != self.num_heads or given.shape[2] != width:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}; this bank needs ({self.num_heads}, m, {width}): "
                    f"{self.num_heads} heads of width {width}"
                )
            given = given.detach().to(self.device, self.dtype)
            bad = (~torch.isfinite(given)).nonzero()
            if len(bad):
                head, row, column = bad[0].tolist()
                value = float(given[head, row, column])
                raise ValueError(f"{name}[{head}, {row}, {column}] is {value}; memories must be finite")
            new.append(given)
        if new[0].shape[1] != new[1].shape[1]:
            raise ValueError(f"keys holds {new[0].shape[1]} tokens, values {new[1].shape[1]}")
        new.append(new[0].float().norm(dim=-1))
        self.keys, self.values, self.norms = (
            _grown(old, more) for old, more in zip((self.keys, self.values, self.norms), new)
        )
        self._queries, self._screens = 0, None
        for index, more in zip(self.indexes or (), new[0].float()):
            index.add(more)

    def clear(self) -> None:
        """Forget all memories."""
        self.keys, self.values, self.norms = (
            a.new_empty(a.shape[0], 0, *a.shape[2:]) for a in (self.keys, self.values, self.norms)
        )
        self._forget()

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> MemoryBank:
        """A bank with the same memories elsewhere or in another type; itself where nothing changes."""
        dtype = self.dtype if dtype is None else dtype
        device = self.device if device is None else torch.device(device)
        if device == self.device and dtype == self.dtype:
            return self
        other = MemoryBank(
            self.num_heads, self.head_dim, self.value_dim, metric=self.metric, index=self.index,
            device=device, dtype=dtype,
        )  # fmt: skip
        other.add(self.keys, self.values)
        return other

    def __copy__(self) -> MemoryBank:  # two banks must not grow into the same room
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles make their own
        made = ("_lock", "handle", "_queries", "_screens", "indexes")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def rows(self, which: str) -> tuple[Tensor, int]:
        """Keys or values as one table of rows; memory i of head h is row ``h * step + i``. And the step."""
        held = self.keys if which == "keys" else self.values
        width = held.shape[2]
        step = held.stride(0) // width
        return held.as_strided(((self.num_heads - 1) * step + len(self), width), (width, 1)), step

    # ---------------------------------------------------------------- searching
    @torch.no_grad()
    def search(self, query: Tensor, k: int) -> Neighbors:
        """The k memories nearest to each query, by the metric.

        Parameters
        ----------
        query : Tensor, shape (num_heads, nq, head_dim), floating point
            On the bank's device.
        k : int

        Returns
        -------
        scores : Tensor, shape (num_heads, nq, min(k, n)), float32 or float64
            Best first.
        ids : Tensor, int64, likewise
            Numbers of memories in the order of their addition. Equal scores in the order of their numbers; -1
            where an index found fewer.

        Raises
        ------
        ValueError
            A shape that does not fit, k < 1, NaN (on CUDA a NaN score comes first).

        Notes
        -----
        Exact: one pass over the keys of a head for all its queries, no matrix of scores is written. On CUDA
        float64, and everything where lutra has no kernels, is searched with torch's own ops, in which equal
        scores come in any order.
        """
        k = _checks.integer("k", k, 1)
        if query.dim() != 3 or query.shape[0] != self.num_heads or query.shape[2] != self.head_dim:
            raise ValueError(
                f"query has shape {tuple(query.shape)}; a bank of {self.num_heads} heads with keys of width "
                f"{self.head_dim} needs ({self.num_heads}, nq, {self.head_dim})"
            )
        if query.device != self.device:
            raise ValueError(f"query is on {query.device}, the bank on {self.device}; bank.to moves it")
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        query, k = query.detach().to(wide), min(k, len(self))
        scores = query.new_empty(*query.shape[:2], k)
        ids = torch.empty(scores.shape, dtype=torch.int64, device=query.device)
        if scores.numel():
            for head, way in enumerate(self._ways(query.shape[1], k)):
                scores[head], ids[head] = way(query[head].contiguous(), head, k)
        return Neighbors(scores, ids)

    def build(self) -> MemoryBank:
        """Make now what searches would make in time: the codes of an exact bank, or its indexes.

        On CUDA searches make no codes, and those of an exact bank are made only here; the call waits for the
        device, so that any stream may search.
        """
        on_gpu = self.device.type == "cuda" and self.index == "exact" and self._kernels() is not None
        if len(self) and (self.device.type == "cpu" or on_gpu) and self.dtype != torch.float64:
            with self._lock:
                self._make()
            if on_gpu:
                torch.cuda.synchronize(self.device)
        return self

    def _kernels(self) -> Any:
        """The module that serves the bank's device."""
        return _backend.cuda if self.device.type == "cuda" else _backend.core

    def _make(self) -> None:
        if self.index == "exact":
            if self._screens is None:
                self._screens = [quantize_int8(keys, self.metric) for keys in self.keys]
        elif self.indexes is None:
            self.indexes = [self._index(keys) for keys in self.keys]

    def _index(self, keys: Tensor) -> Any:
        index = factory(self.index, self.head_dim, self.metric)
        if not index.is_trained:
            index.train(keys.float())
        index.add(keys.float())
        return index

    def _ways(self, queries: int, k: int) -> Iterator[Any]:
        """What searches each head."""
        on_gpu = self.device.type != "cpu"
        if on_gpu and self.index != "exact":
            raise NotImplementedError(f"a bank with index={self.index!r} is searched on the CPU only")
        if on_gpu and (self._kernels() is None or self.dtype == torch.float64):
            way = self._dense
        elif self.index != "exact":
            if self.indexes is None:
                with self._lock:
                    self._make()
            way = self._by_index
        else:
            self._queries += queries
            coded = len(self) >= 32 * k and self.dtype != torch.float64 and self._kernels() is not None
            if coded and self._screens is None and self._queries >= _PAYS_AFTER and not on_gpu:
                with self._lock:
                    self._make()
            way = self._screened if coded and self._screens is not None else self._exact
        return itertools.repeat(way, self.num_heads)

    def _exact(self, query: Tensor, head: int, k: int) -> Any:
        return knn(query, self.keys[head], k, self.metric)

    def _screened(self, query: Tensor, head: int, k: int) -> Any:
        assert self._screens is not None
        return knn_screened(query, self.keys[head], self._screens[head], k, self.metric)

    def _by_index(self, query: Tensor, head: int, k: int) -> Any:
        assert self.indexes is not None
        return self.indexes[head].search(query, k)

    def _dense(self, query: Tensor, head: int, k: int) -> Any:
        """In torch's own ops."""
        keys = self.keys[head].to(query.dtype)
        if self.metric == "cosine":
            keys = torch.nn.functional.normalize(keys, dim=-1)
            query = torch.nn.functional.normalize(query, dim=-1)
        parts = [(q @ keys.T).topk(k) for q in query.split(max(1, _PART // len(self)))]
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: tensors keys, values and norms."""
        _files.write(path, bank_tensors(self), _files.describe(KIND, bank_config(self)))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = True, device: Any = "cpu") -> MemoryBank:
        """A bank that was saved.

        With ``mmap`` it opens at once, whatever its size: pages are read when they are needed (adding copies
        it to memory).

        Raises
        ------
        FileNotFoundError, OSError
            The file cannot be opened.
        ValueError
            It is no such file, is of a newer version or is damaged.
        """
        with open(path, "rb") as opened:
            file = _files.File(path, opened)
            file.expect(KIND, "a MemoryBank")
        return bank_of(cls, file, file.config, "", mmap, device)


def _grown(old: Tensor, more: Tensor) -> Tensor:
    """A view of old with more behind it on axis 1, in place where there is room."""
    begin, end = old.shape[1], old.shape[1] + more.shape[1]
    room = old.stride(0) // max(1, old.stride(1)) if old.shape[1] else 0
    if begin == 0 or end > room:
        # The first addition takes what it needs; later ones half of it more.
        size = end if begin == 0 else max(end, begin + begin // 2)
        held = old.new_empty(old.shape[0], size, *old.shape[2:])
        held[:, :begin] = old
    else:
        held = old.as_strided((old.shape[0], room, *old.shape[2:]), old.stride(), old.storage_offset())
    held[:, begin:end] = more
    return held[:, :end]


# ---------------------------------------------------------------- the op
_numbers = itertools.count()
_banks: weakref.WeakValueDictionary[int, MemoryBank] = weakref.WeakValueDictionary()


def _memory_search(kind: Any, query: Tensor, bank: int, k: int) -> Tensor:
    return _banks[bank].search(query, k).ids


# A bank is named by its number: an op takes tensors and numbers, and codes and indexes are neither.
register(
    "memory_search(Tensor query, int bank, int k) -> Tensor",
    _memory_search,
    lambda query, bank, k: query.new_empty((*query.shape[:2], k), dtype=torch.int64),
)
