"""prune: a table without the tokens that a corpus does not use."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import _checks
from .._arrays import is_torch, kind_of
from ..compress._table import Table, check_counts, encode, to_numpy
from ._source import Source


class Pruned(NamedTuple):
    """Result of `prune`.

    Attributes
    ----------
    table : what was given (array, layer or Table), with the kept rows
    id_map : ndarray, shape (old rows,), int64
        The new id of each old one, -1 for those that are gone. `map_ids` applies it.
    kept : ndarray, shape (new rows,), int64
        The old id of each new one, increasing.
    exact : bool
        Whether rows are the old ones to the bit. False only for a compressed table whose format shares
        storage between rows, so that it had to be encoded again.
    """

    table: Any
    id_map: np.ndarray
    kept: np.ndarray
    exact: bool

    def vocab(self, vocab: Mapping[str, int]) -> dict[str, int]:
        """A vocabulary (token to id) with the kept tokens and their new ids."""
        size = len(self.id_map)
        for token, number in vocab.items():
            if not 0 <= number < size:
                raise IndexError(f"vocab[{token!r}] is {number}; it must lie in [0, {size})")
        return {t: int(self.id_map[i]) for t, i in vocab.items() if self.id_map[i] >= 0}


def count_tokens(ids: Any, rows: int) -> np.ndarray:
    """How often each id occurs.

    Parameters
    ----------
    ids : integer array of any shape (NumPy, torch), or an iterable of such arrays or lists
    rows : int
        Size of the vocabulary.

    Returns
    -------
    ndarray, shape (rows,), int64

    Raises
    ------
    IndexError
        An id outside [0, rows).

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.vocab.count_tokens([[1, 2], [1]], 4).tolist()
    [0, 2, 1, 0]
    """
    rows = _checks.integer("rows", rows, 0)
    total = np.zeros(rows, np.int64)
    whole = hasattr(ids, "shape")
    for part in [ids] if whole else ids:
        flat = _integers("ids", part)
        bad = (flat < 0) | (flat >= rows)
        if bad.any():
            raise IndexError(f"ids holds {flat[bad.argmax()]}; ids must lie in [0, {rows})")
        total += np.bincount(flat, minlength=rows)
    return total


def _integers(name: str, a: Any) -> np.ndarray:
    flat = np.asarray(to_numpy(a)).reshape(-1)
    if flat.size == 0 and flat.dtype.kind == "f" and not hasattr(a, "dtype"):
        return flat.astype(np.int64)  # an empty list
    if flat.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got dtype {flat.dtype}")
    return flat.astype(np.int64)


def prune(
    source: Any,
    counts: Any = None,
    *,
    special: Iterable[int] = (),
    min_count: int = 1,
    rows: int | None = None,
    seed: int = 0,
) -> Pruned:
    """Keep the tokens that occur, and special ones.

    Parameters
    ----------
    source : array, shape (rows, dim), torch.nn.Embedding or EmbeddingBag, compressed layer or Table
        A layer gives a layer of its class, with its settings; its padding row is kept, and padding_idx
        follows it.
    counts : array, shape (rows,), optional
        How often each token occurs (`count_tokens`). Without counts only ``special`` tokens stay.
    special : iterable of int
        Ids that stay whatever their counts: [PAD], [UNK], the bytes of a byte-level tokenizer, ...
    min_count : int, default 1
        Tokens that occur less often go.
    rows : int, optional
        At most so many tokens stay: special ones first, then the most frequent (of equal ones the lowest id).
    seed : int, default 0
        For encoding a compressed table again, where that is needed.

    Returns
    -------
    Pruned
        Kept tokens stay in their order.

    Raises
    ------
    TypeError, ValueError, IndexError
        Wrong types, shapes or ids; nothing would be left; more special tokens than ``rows``.

    Notes
    -----
    A compressed table keeps its codes: the arrays with an entry a row are cut, and the result is decoded and
    compared with the old rows. Where they differ (a format that shares storage between rows), the kept rows
    are encoded again, with the counts, and ``exact`` is False.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> pruned = lutra.vocab.prune(np.eye(4, dtype=np.float32), np.array([0, 5, 0, 2]), special=[0])
    >>> pruned.kept.tolist(), pruned.id_map.tolist()
    ([0, 1, 3], [0, 1, -1, 2])
    """
    given = Source(source)
    size = given.shape[0]
    keep = np.zeros(size, bool)
    for i in special:
        i = _checks.integer("special", i)
        if not 0 <= i < size:
            raise IndexError(f"special holds {i}; ids must lie in [0, {size})")
        keep[i] = True
    pad = getattr(given.layer, "padding_idx", None)
    if pad is not None:
        keep[pad] = True
    number = None
    if counts is not None:
        number = check_counts(counts if hasattr(counts, "dtype") else np.asarray(counts), size)
        min_count = _checks.integer("min_count", min_count, 0)
        frequent = number >= min_count
        if rows is not None:
            room = _checks.integer("rows", rows, 1) - int(keep.sum())
            if room < 0:
                raise ValueError(
                    f"rows is {rows}; there are {int(keep.sum())} special tokens, which all stay"
                )
            rest = np.flatnonzero(frequent & ~keep)
            order = rest[np.argsort(-number[rest], kind="stable")[:room]]
            frequent = np.zeros(size, bool)
            frequent[order] = True
        keep |= frequent
    elif rows is not None:
        raise ValueError("rows needs counts, to know which tokens to keep")
    kept = np.flatnonzero(keep)
    if not kept.size:
        raise ValueError("no token would be left: lower min_count, or name special tokens")
    id_map = np.full(size, -1, np.int64)
    id_map[kept] = np.arange(len(kept))
    exact = True
    if given.table is not None:
        table, exact = _cut(given.table, kept, given, number, seed)
        if given.layer is not None:
            table = _compressed_layer(given.layer, table, id_map)
    elif given.layer is not None:
        table = _layer(given.layer, kept, id_map)
    elif given.kind.name == "torch":
        table = given.array.detach()[given.kind.torch.from_numpy(kept).to(given.array.device)]  # type: ignore[attr-defined]
    else:
        table = given.array[kept]
    return Pruned(table, id_map, kept, exact)


# ---------------------------------------------------------------- tables and layers
def _cut(
    table: Table, kept: np.ndarray, given: Source, counts: np.ndarray | None, seed: int
) -> tuple[Table, bool]:
    size, dim = table.shape
    shape = (len(kept), dim)
    want = given.rows(kept)
    data = {}
    for name, array in table.data.items():
        index = kept
        if is_torch(array):
            import torch

            index = torch.from_numpy(kept).to(array.device)
        data[name] = array[index] if len(array.shape) and array.shape[0] == size else array
    try:
        cut = Table(table.format, shape, data)
        if np.array_equal(Source(cut).rows(np.arange(len(kept))), want):
            return cut, True
    except (ValueError, IndexError, RuntimeError):
        pass  # not a format of one entry a row
    like = next(iter(table.data.values()))
    weights = None if counts is None else counts[kept]
    fresh = encode(want, table.format, counts=weights, seed=seed, progress=False)
    if is_torch(like):
        import torch

        fresh.data.update({k: torch.from_numpy(v).to(like.device) for k, v in fresh.data.items()})
    return fresh, False


def _new_padding(layer: Any, id_map: np.ndarray) -> int | None:
    pad = getattr(layer, "padding_idx", None)
    return None if pad is None else int(id_map[pad])


def _layer(layer: Any, kept: np.ndarray, id_map: np.ndarray) -> Any:
    """A copy of an Embedding with the kept rows; the old weight is not copied on the way."""
    import torch

    weight = layer.weight
    index = torch.from_numpy(kept).to(weight.device)
    rows = torch.nn.Parameter(weight.detach()[index], requires_grad=weight.requires_grad)
    new = copy.deepcopy(layer, {id(weight): rows})
    new.num_embeddings, new.padding_idx = len(kept), _new_padding(layer, id_map)
    return new


def _compressed_layer(layer: Any, table: Table, id_map: np.ndarray) -> Any:
    names = (
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
        "mode",
        "include_last_offset",
    )
    settings = {n: getattr(layer, n) for n in names if hasattr(layer, n)}
    settings["padding_idx"] = _new_padding(layer, id_map)
    new = type(layer).from_table(table, dtype=layer.weight.dtype, device=layer.weight.device, **settings)
    row = getattr(layer, "padding_row", None)
    if row is not None:
        new.padding_row.copy_(row)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    return new.train(layer.training)


# ---------------------------------------------------------------- ids
def map_ids(ids: Any, id_map: Any, unk: int | None = None) -> Any:
    """Old ids as new ones.

    Parameters
    ----------
    ids : integer array of any shape (NumPy, torch, CuPy)
    id_map : array, shape (old rows,), int64, or `Pruned`
    unk : int, optional
        The new id that stands for tokens that are gone. Without it they are an error.

    Returns
    -------
    array, the shape, type and library of ids

    Raises
    ------
    IndexError
        An id outside [0, old rows).
    ValueError
        A token that is gone, and no ``unk``.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> lutra.vocab.map_ids(np.array([3, 2, 0]), np.array([0, 1, -1, 2]), unk=1).tolist()
    [2, 1, 0]
    """
    table = np.asarray(to_numpy(id_map.id_map if isinstance(id_map, Pruned) else id_map))
    if table.ndim != 1 or table.dtype.kind not in "iu":
        raise TypeError("id_map must be a 1-d array of integers, or what prune gave")
    kind = kind_of(ids, "ids")
    old = kind.to_numpy(ids)
    if old.dtype.kind not in "iu":
        raise TypeError(f"ids has dtype {old.dtype}; it must be integers")
    bad = (old < 0) | (old >= len(table))
    if bad.any():
        where = np.unravel_index(int(bad.argmax()), old.shape)
        raise IndexError(
            f"ids[{', '.join(map(str, where))}] is {old[where]}; ids must lie in [0, {len(table)}), "
            "the old vocabulary"
        )
    new = table[old]
    gone = new < 0
    if gone.any():
        if unk is None:
            where = np.unravel_index(int(gone.argmax()), old.shape)
            raise ValueError(
                f"ids[{', '.join(map(str, where))}] is {old[where]}, a token that was pruned, as are "
                f"{int(gone.sum())} of {old.size} ids; keep it, or give unk, the new id that stands for it"
            )
        new = np.where(gone, _checks.integer("unk", unk, 0, max(int(table.max(initial=-1)), 0)), new)
    new = new.astype(old.dtype)
    if kind.name == "torch":
        return kind.torch.from_numpy(new).to(ids.device)  # type: ignore[attr-defined]
    if kind.name == "numpy":
        return new
    with ids.device:
        return kind.cupy.asarray(new)  # type: ignore[attr-defined]
