"""What is relevant, in any of the forms that callers have it in, as lists one after another."""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .._arrays import F64, I64, is_native, type_name
from .._results import Neighbors
from ..index._home import HOST, Home, adopt

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FORMS = (
    "an array (nq,) of one id a query or (nq, r) padded with -1; a list of an id, of ids or of {id: grade} "
    "for each query; or a tuple (ids, ptr) or (ids, ptr, grades) of lists one after another"
)


class Relevance(NamedTuple):
    """Relevant ids of all queries, each once in its query's list; arrays of a home.

    Attributes
    ----------
    query, id : array, shape (r,), int64
        In the order of queries, then of ids.
    grade : array, shape (r,), float64, or None where all are 1
        Positive.
    """

    query: Any
    id: Any
    grade: Any


def relevance(home: Home, relevant: Any, nq: int) -> Relevance:
    """Check what the caller gave, and bring it into one form."""
    if isinstance(relevant, Neighbors):
        relevant = relevant.ids
    if isinstance(relevant, tuple):
        query, ids, grades = _ragged(home, relevant, nq)
    elif is_native(relevant) or hasattr(relevant, "__dlpack__"):
        query, ids, grades = _array(home, relevant, nq)
    elif isinstance(relevant, list):
        query, ids, grades = _lists(home, relevant, nq)
    else:
        raise TypeError(f"relevant must be {FORMS}; got {type_name(relevant)}")
    keep = ids >= 0 if grades is None else (ids >= 0) & (grades > 0)
    query, ids = query[keep], ids[keep]
    grades = None if grades is None else grades[keep]
    return _unique(home, query, ids, grades)


def integers(home: Home, a: Any, name: str) -> Any:
    """An array of integers as int64 in a home."""
    native = adopt(a, name)
    got = str(native.dtype).removeprefix("torch.")
    if got not in _INTEGERS:
        raise TypeError(f"{name} must hold integers (ids), got dtype {got}")
    return home.kind.cast(home.bring(native), I64)


def _queries(nq: int, got: int, what: str) -> None:
    if got != nq:
        raise ValueError(f"relevant has {what} for {got} queries, ids has {nq}")


def _array(home: Home, relevant: Any, nq: int) -> tuple[Any, Any, Any]:
    native = adopt(relevant, "relevant")
    if isinstance(native, np.ndarray) and native.dtype == object:
        return _lists(home, list(native), nq)
    ids = integers(home, native, "relevant")
    shape = tuple(ids.shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"relevant must be (nq,) or (nq, r), got shape {shape}")
    _queries(nq, shape[0], "rows")
    width = 1 if len(shape) == 1 else shape[1]
    return home.arange(nq * width) // max(1, width), ids.reshape(-1), None


def _ragged(home: Home, relevant: tuple[Any, ...], nq: int) -> tuple[Any, Any, Any]:
    if len(relevant) not in (2, 3):
        raise ValueError(
            f"relevant as a tuple must be (ids, ptr) or (ids, ptr, grades), got {len(relevant)} items; "
            "give the relevant ids of each query as a list"
        )
    parts = [np.asarray(part) if isinstance(part, (list, range)) else part for part in relevant]
    if isinstance(parts[0], np.ndarray) and not parts[0].size:
        parts[0] = parts[0].astype(np.int64)
    ids = integers(home, parts[0], "relevant[0] (the ids)")
    ptr = integers(HOST, parts[1], "relevant[1] (ptr)")
    n = int(ids.shape[0]) if len(ids.shape) == 1 else -1
    if n < 0 or ptr.ndim != 1:
        raise ValueError(
            "relevant as a tuple must be 1-d arrays (ids, ptr), "
            f"got shapes {tuple(ids.shape)} and {ptr.shape}"
        )
    _queries(nq, len(ptr) - 1, "ptr")
    if ptr[0] != 0 or ptr[-1] != n or (np.diff(ptr) < 0).any():
        raise ValueError(
            f"relevant's ptr must rise from 0 to the number of ids ({n}); it goes from {ptr[0]} to {ptr[-1]}"
            + (", and falls in between" if (np.diff(ptr) < 0).any() else "")
        )
    grades = None
    if len(parts) == 3:
        native = adopt(parts[2], "relevant[2] (the grades)")
        if tuple(native.shape) != (n,):
            raise ValueError(f"relevant has {n} ids, and grades of shape {tuple(native.shape)}")
        grades = home.kind.cast(home.bring(native), F64)
        if bool((grades != grades).any()):
            raise ValueError("relevant's grades hold NaN")
    query = home.positions(np.repeat(np.arange(nq), np.diff(ptr)))
    return query, ids, grades


def _lists(home: Home, relevant: list[Any], nq: int) -> tuple[Any, Any, Any]:
    """Lists of Python objects: one id, several, or a mapping to grades for each query."""
    _queries(nq, len(relevant), "entries")
    if not nq:
        return home.positions(np.empty(0, np.int64)), home.positions(np.empty(0, np.int64)), None
    if all(isinstance(entry, Mapping) for entry in relevant):
        lengths = [len(entry) for entry in relevant]
        ids = _flat(chain.from_iterable(relevant), sum(lengths))
        values = chain.from_iterable(entry.values() for entry in relevant)
        try:
            grades = np.fromiter((float(value) for value in values), np.float64, sum(lengths))
        except (TypeError, ValueError) as error:
            raise TypeError(f"the grades of relevant must be numbers: {error}") from None
        if np.isnan(grades).any():
            raise ValueError("relevant's grades hold NaN")
    elif all(isinstance(entry, (int, np.integer)) for entry in relevant):
        lengths, grades = [1] * nq, None
        ids = _flat(relevant, nq)
    else:
        entries = [_entry(entry, i) for i, entry in enumerate(relevant)]
        lengths, grades = [len(entry) for entry in entries], None
        ids = _flat(chain.from_iterable(entries), sum(lengths))
    query = np.repeat(np.arange(nq), lengths)
    return home.positions(query), home.positions(ids), None if grades is None else home.bring(grades)


def _entry(entry: Any, i: int) -> Any:
    """The relevant ids of query i as a sequence of integers."""
    if isinstance(entry, (list, tuple, Set, range)):
        return entry
    if is_native(entry) or hasattr(entry, "__dlpack__"):
        native = adopt(entry, f"relevant[{i}]")
        if len(native.shape) != 1:
            raise ValueError(f"relevant[{i}] must be 1-d, got shape {tuple(native.shape)}")
        return HOST.bring(native).tolist()
    if isinstance(entry, Mapping):
        raise TypeError(
            f"relevant[{i}] is {{id: grade}}, others are not; give grades for all queries or none"
        )
    raise TypeError(
        f"relevant[{i}] must be ids of query {i} (a list, a set or an array), got {type_name(entry)}"
    )


def _flat(ids: Any, count: int) -> np.ndarray:
    def checked():
        for value in ids:
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"relevant must hold ids, integers as the index has them; got {value!r}")
            yield value

    try:
        return np.fromiter(checked(), np.int64, count)
    except OverflowError:
        raise ValueError("relevant holds an id beyond 64 bits") from None


def _unique(home: Home, query: Any, ids: Any, grades: Any) -> Relevance:
    """In the order of queries, then ids; of what is there twice the highest grade."""
    if not ids.shape[0]:
        return Relevance(query, ids, grades)
    order = lexsort(home, [query, ids] if grades is None else [query, ids, -grades])
    query, ids = query[order], ids[order]
    grades = None if grades is None else grades[order]
    first = home.xp.ones_like(ids) > 0
    first[1:] = (query[1:] != query[:-1]) | (ids[1:] != ids[:-1])
    return Relevance(query[first], ids[first], None if grades is None else grades[first])


def lexsort(home: Home, keys: list[Any]) -> Any:
    """The order by the first key, among equal ones by the second, and so on."""
    if home.kind.name == "torch":
        order = home.xp.argsort(keys[-1], stable=True)
        for key in keys[-2::-1]:
            order = order[home.xp.argsort(key[order], stable=True)]
        return order
    if home.kind.name == "cupy":  # which wants one array, so of one type: float64 would round large ids
        ranks = [home.xp.unique(key, return_inverse=True)[1] for key in keys]
        return home.xp.lexsort(home.xp.stack(ranks[::-1]))
    return np.lexsort(keys[::-1])
