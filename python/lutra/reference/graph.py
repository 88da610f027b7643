"""Reference of the graph kernels; `csrc/graph/graph.h` is the contract.

The same arguments as the compiled functions, whose arrays are written in place. Plain: a node at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .scan import pairwise

F32, F16, BF16, I8, CODES = 0, 1, 2, 3, 4
_WIDE = (np.inf, -1)


class Graph(NamedTuple):
    rows: np.ndarray
    terms: Any
    links: np.ndarray
    upper: np.ndarray
    upper_at: np.ndarray
    levels: np.ndarray
    n: int
    upper_rows: int
    d: int
    stride: int
    width: int
    upper_width: int
    entry: int
    top: int
    storage: int
    metric: int  # 0: ip, 1: l2
    books: Any = None  # of codes: (m, 2**bits, d // m), `bits` 4 or 8
    lanes: Any = None
    m: int = 0
    bits: int = 0

    def list_of(self, node: int, layer: int) -> np.ndarray:
        """The list of a node on a layer, to be read or written."""
        if layer == 0:
            return self.links[node]
        if self.levels[node] < layer:
            return self.upper[:0].reshape(-1)
        return self.upper[self.upper_at[node] + layer - 1]

    def neighbours(self, node: int, layer: int) -> np.ndarray:
        found = self.list_of(node, layer)
        outside = (found < 0) | (found >= self.n)
        return found[: int(outside.argmax())] if outside.any() else found

    def entries(self, nodes: Any) -> np.ndarray:
        rows = self.rows[nodes][..., : -(-self.m * self.bits // 8)]
        if self.bits == 4:
            rows = np.stack([rows & 15, rows >> 4], -1).reshape(*rows.shape[:-1], 2 * rows.shape[-1])
        return rows[..., : self.m]

    def vectors(self, nodes: Any) -> np.ndarray:
        if self.storage == CODES:
            decoded = self.books[np.arange(self.m), self.entries(nodes)]
            return decoded.reshape(*decoded.shape[:-2], self.d)
        terms = None if self.terms is None else self.terms[nodes]
        return decode(self.rows[nodes], terms, self.d, self.storage)

    def walk_keys(self, probe: np.ndarray) -> Callable[[Any], np.ndarray]:
        """Keys as walks see them: of codes by a table of 16-bit integers (csrc/graph/keys_codes.h)."""
        if self.storage != CODES:
            return lambda nodes: self.keys(probe, nodes)
        table, add, mul = code_table(probe, self.books, self.metric)

        def keys(nodes: Any) -> np.ndarray:
            sums = table[np.arange(self.m), self.entries(nodes)].sum(-1, dtype=np.uint32)
            return add + mul * sums.astype(np.float32)

        return keys

    def keys(self, probe: np.ndarray, nodes: Any) -> np.ndarray:
        """Smaller is better: negated inner products or squared distances."""
        x = self.vectors(nodes)
        key = np.square(probe - x).sum(-1) if self.metric else -(probe * x).sum(-1)
        return key.astype(np.float32)


# ---- rows
def int8_codes(x):
    """Codes round(x / s) and scales s = max |x| / 127 of rows."""
    largest = np.abs(x).max(1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, 0).astype(np.float32)
    usable = np.isfinite(inverse)
    inverse = np.where(usable, inverse, 0).astype(np.float32)
    codes = np.rint(x * inverse[:, None]).astype(np.int8)
    return codes, np.where(usable, largest / np.float32(127), 0).astype(np.float32)


def graph_encode(x, n, d, stride, storage, metric, normalise, rows, terms):
    x = x[:n]
    if normalise:
        norm = np.sqrt(np.square(x, dtype=np.float64).sum(1, keepdims=True))
        x = np.divide(x, norm, out=np.zeros(x.shape), where=norm != 0).astype(np.float32)
    if storage == I8:
        codes, scales = int8_codes(x)
        rows[:] = 128
        rows[:, :d] = codes.view(np.uint8) ^ 128
        terms[:, 0] = scales
        squares = np.square(codes.astype(np.int32)).sum(1).astype(np.float32)
        terms[:, 1] = scales * scales * squares if metric else 0
        return
    with np.errstate(over="ignore"):
        values = x if storage == F32 else x.astype(np.float16) if storage == F16 else _to_bf16(x)
    rows[:] = 0
    rows[:, : d * values.itemsize] = np.ascontiguousarray(values).view(np.uint8)


def _to_bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )


def decode(rows, terms, d, storage):
    """Rows as float32 vectors."""
    if storage == I8:
        return (rows[..., :d] ^ 128).view(np.int8).astype(np.float32) * terms[..., :1]
    size = 4 if storage == F32 else 2
    raw = np.ascontiguousarray(rows[..., : d * size])
    if storage == F32:
        return raw.view(np.float32)
    if storage == F16:
        return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


# ---- codes
def code_table(q, books, metric):
    """Integers (m, 2**bits), and what keys add and multiply by."""
    parts = q.reshape(len(books), 1, -1)
    limit = np.float32(1e37)
    with np.errstate(over="ignore", invalid="ignore"):
        floats = np.square(parts - books).sum(-1) if metric else -(parts * books).sum(-1)
    floats = np.clip(np.nan_to_num(floats, nan=limit), -limit, limit)
    low = floats.min(1, keepdims=True)
    span = (floats - low).max()
    exponent = max(int(np.frexp(span / np.float32(65535))[1]), -100)
    table = np.floor((floats - low) * np.float32(2.0**-exponent) + np.float32(0.5)).astype(np.uint16)
    return table, np.float32(low.sum(dtype=np.float64)), np.float32(2.0**exponent)


# ---- walking
def _mix(v):
    v = np.asarray(v).astype(np.uint32)
    v = v ^ (v >> np.uint32(16))
    v = v * np.uint32(0x7FEB352D)
    v = v ^ (v >> np.uint32(15))
    v = v * np.uint32(0x846CA68B)
    return v ^ (v >> np.uint32(16))


def _ties(nodes, owner):
    """What orders nodes at equal keys: their positions, or for insertions a hash of both nodes."""
    nodes = np.asarray(nodes, np.int64)
    if owner is None:
        return nodes
    salt = _mix(np.array([(owner + 0x9E3779B9) & 0xFFFFFFFF], np.uint32))
    return _mix(nodes.astype(np.uint32) * np.uint32(0x9E3779B1) ^ salt).astype(np.int64)


def _nearest(keys, nodes, owner, count):
    """The nearest ``count``, in order."""
    order = np.lexsort((_ties(nodes, owner), keys))[:count]
    return keys[order], nodes[order]


def _descend(g, keys_of, layers, node, avoid=-1):
    key = keys_of([node])[0]
    for layer in layers:
        moved = True
        while moved:
            moved = False
            for other in g.neighbours(node, layer).tolist():
                if other == avoid:
                    continue
                its = keys_of([other])[0]
                if its < key or (its == key and other < node):
                    key, node, moved = its, other, True
    return node


def _spread(g, keys_of, layer, start, ef, owner=None):
    """Best first from some nodes: the ``ef`` nearest that were seen."""
    keys, pool = _nearest(keys_of(start), start, owner, ef)
    seen = set(start.tolist()) | ({owner} if owner is not None else set())
    read: set[int] = set()
    while True:
        node = next((v for v in pool.tolist() if v not in read), None)
        if node is None:
            return keys, pool
        read.add(node)
        new = [v for v in dict.fromkeys(g.neighbours(node, layer).tolist()) if v not in seen]
        if new:
            seen.update(new)
            found = np.array(new, np.int64)
            keys, pool = _nearest(
                np.concatenate([keys, keys_of(found)]), np.concatenate([pool, found]), owner, ef
            )


def graph_search(
    graph, q, turned, nq, k, ef, rescore, keep, allowed, exact, exact_type, score_metric, scores, ids, visited
):
    g = Graph(*graph)
    name = ("ip", "l2", "cosine")[score_metric]
    mask = None if keep is None else np.unpackbits(keep, count=g.n, bitorder="little").astype(bool)
    capacity = max(1, min(max(ef, k), allowed))
    pool = int(capacity * g.n / allowed) if allowed > 0 else 1
    scan = g.entry < 0 or allowed <= 0 or allowed <= pool * g.width // 3
    for i in range(nq):
        query = q[i]
        if name == "cosine":
            norm = np.sqrt(np.square(query, dtype=np.float64).sum())
            query = (query / norm if norm else np.zeros(len(query))).astype(np.float32)
        probe = query
        if g.storage == I8:
            codes, scale = int8_codes(query[None])
            probe = codes[0] * scale
        if turned is not None:
            probe = turned[i]
        keys_of = g.walk_keys(probe)
        found = np.empty(0, np.int64)
        if not scan:
            start = np.array([_descend(g, keys_of, range(g.top, 0, -1), g.entry)])
            keys, found = _spread(g, keys_of, 0, start, max(pool, capacity))
            if mask is not None:
                keys, found = keys[mask[found]], found[mask[found]]
        if len(found) < min(k, allowed):
            found = np.arange(g.n) if mask is None else np.flatnonzero(mask)
            keys, found = _nearest(keys_of(found), found, None, capacity if scan else max(pool, capacity))
        sign = -1 if name == "l2" else 1
        if not len(found):
            keys = np.empty(0, np.float32)
        if exact is not None and len(found):
            found = found[:rescore]
            keys = -sign * pairwise(query[None], exact[found].astype(np.float32), name)[0]
            keys, found = _nearest(keys, found, None, k)
        count = min(k, len(found))
        scores[i, :count], ids[i, :count] = -sign * keys[:count], found[:count]
        scores[i, count:], ids[i, count:] = -sign * np.inf, -1


# ---- linking
def _choose(g, keys, nodes, node, most, alpha, fill):
    """The heuristic: taken unless nearer to one taken before than to the node; then filled up to ``fill``."""
    taken: list[int] = []
    passed: list[tuple[int, bool]] = []
    for i, (key, candidate) in enumerate(zip(keys, nodes.tolist())):
        if len(taken) == most:
            break
        if candidate == node:
            continue
        if taken and (np.float32(alpha) * g.keys(g.vectors(candidate), taken) <= key).any():
            passed.append((candidate, i > 0 and key == keys[i - 1]))
        else:
            taken.append(candidate)
    copies = most // 4
    for candidate, copy in passed:
        if len(taken) >= min(fill, most):
            break
        if copy:
            copies -= 1
            if copies < 0:
                continue
        taken.append(candidate)
    return taken


def graph_insert(graph, nodes, count, ef, alpha, fill, owners, heads):
    g = Graph(*graph)
    wanted: dict[tuple[int, int], list[int]] = {}  # (node, layer): the new nodes that chose it
    lists = []
    for node in nodes[:count].tolist():
        probe = g.vectors(node)
        keys_of = g.walk_keys(probe)
        level = min(int(g.levels[node]), g.top)
        start = np.array([_descend(g, keys_of, range(g.top, level, -1), g.entry, node)])
        for layer in range(level, -1, -1):
            keys, start = _spread(g, keys_of, layer, start, ef, node)
            width = g.width if layer == 0 else g.upper_width
            near = start
            if g.storage == CODES:  # whose walks have other keys
                keys, near = _nearest(g.keys(probe, start), start, node, ef)
            chosen = _choose(g, keys, near, node, width, alpha, fill)
            lists.append((node, layer, chosen))
            for other in chosen:
                if len(g.list_of(other, layer)) == 0:
                    continue  # a file named it on a layer that it is not on
                wanted.setdefault((other, layer), []).append(node)
    for node, layer, chosen in lists:
        g.list_of(node, layer)[: len(chosen)] = chosen
    for (node, layer), sources in wanted.items():
        where = g.list_of(node, layer)
        have = g.neighbours(node, layer).tolist()
        merged = have + sorted(set(sources) - set(have))
        if len(merged) > len(where):
            candidates = np.array(merged, np.int64)
            keys = g.keys(g.vectors(node), candidates)
            keys, candidates = _nearest(keys, candidates, node, max(4 * g.width, 256))
            merged = _choose(g, keys, candidates, node, len(where), alpha, fill)
        where[:] = -1
        where[: len(merged)] = merged


def graph_repair(graph, dead, alpha, fill):
    g = Graph(*graph)
    gone = np.unpackbits(dead, count=g.n, bitorder="little").astype(bool)
    for node in np.flatnonzero(~gone).tolist():
        for layer in range(int(g.levels[node]) + 1):
            _repair(g, node, layer, gone, alpha, fill)


def _repair(g, node, layer, gone, alpha, fill):
    where = g.list_of(node, layer)
    near = g.neighbours(node, layer).tolist()
    ring = [v for v in near if gone[v]]
    if not ring:
        return
    stay = [v for v in near if not gone[v]]
    seen = {node, *near}
    total = len(ring)
    while ring and (total == len(ring) or len(stay) < len(where)):
        following = []
        for v in ring:
            for other in g.neighbours(v, layer).tolist():
                if other in seen:
                    continue
                seen.add(other)
                if not gone[other]:
                    if len(stay) < 1024:
                        stay.append(other)
                elif total < 1024:
                    total += 1
                    following.append(other)
        ring = following
        if total == len(ring):
            break
    candidates = np.array(stay, np.int64)
    keys, candidates = _nearest(g.keys(g.vectors(node), candidates), candidates, node, 1024)
    merged = _choose(g, keys, candidates, node, len(where), alpha, fill)
    where[:] = -1
    where[: len(merged)] = merged
