"""Cases of `lutra.scan`."""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import scan
from .._backend import get_num_threads
from . import data, expect
from .case import Case, Prepared

K = 10


def numpy_knn(
    queries: np.ndarray, database: np.ndarray, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """The usual NumPy way: all scores by a matrix product, then argpartition and a sort of the k."""
    scores = queries @ database.T
    if metric == "l2":
        scores = 2 * scores - np.einsum("ij,ij->i", database, database)
    part = np.argpartition(scores, -k, axis=1)[:, -k:]
    best = np.take_along_axis(scores, part, 1)
    order = np.argsort(-best, axis=1)
    return np.take_along_axis(best, order, 1), np.take_along_axis(part, order, 1)


def torch_knn(queries, database, k, metric):
    """The usual torch way, in blocks of queries whose scores fit in half a gigabyte."""
    import torch

    block = max(1, (1 << 27) // max(1, len(database)))
    norms = (database * database).sum(1) if metric == "l2" else None
    out = []
    for q in queries.split(block):
        scores = q @ database.T if norms is None else torch.addmm(norms, q, database.T, beta=-1, alpha=2)
        out.append(scores.topk(k, dim=1))
    return out


def faiss_flat(database: np.ndarray, metric: str):
    """FAISS's exact index over the rows, with as many threads as lutra uses; None where FAISS is missing."""
    faiss = data.installed("faiss")
    if faiss is None:
        return None
    faiss.omp_set_num_threads(get_num_threads())
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(database.shape[1])
    index.add(database)
    return index


def _knn(batch: int, metric: str, quick: bool) -> Prepared:
    n, d = (100_000 if quick else 1_000_000), 128
    database, queries = data.vectors(n, d), data.vectors(batch, d, seed=1)
    peers = {}
    if batch * n <= 20_000_000:  # beyond, NumPy's score matrix takes gigabytes
        peers["numpy"] = lambda: numpy_knn(queries, database, K, metric)
    torch = data.installed("torch")
    if torch is not None:
        tensors = torch.from_numpy(queries), torch.from_numpy(database)
        peers["torch"] = lambda: torch_knn(*tensors, K, metric)
    index = faiss_flat(database, metric)
    if index is not None:
        peers["faiss"] = lambda: index.search(queries, K)
    return Prepared(
        ours=lambda: scan.knn(queries, database, K, metric),
        check=lambda: expect.neighbours(scan.knn(queries, database, K, metric), queries, database, K, metric),
        peers=peers,
        bytes=4.0 * n * d,
        flops=2.0
        * batch
        * n
        * d,  # l2's subtractions have units of their own beside the FMA's on some machines
        work=batch,
        unit="queries",
    )


def _half(batch: int, quick: bool) -> Prepared:
    n, d = (100_000 if quick else 1_000_000), 128
    database, queries = data.vectors(n, d).astype(np.float16), data.vectors(batch, d, seed=1)
    wide = database.astype(np.float32)
    return Prepared(
        ours=lambda: scan.knn(queries, database, K),
        check=lambda: expect.neighbours(scan.knn(queries, database, K), queries, wide, K, "ip"),
        peers={"lutra, float32": lambda: scan.knn(queries, wide, K)},
        bytes=2.0 * n * d,
        flops=2.0 * batch * n * d,
        work=batch,
        unit="queries",
    )


def _filtered(batch: int, share: float, quick: bool) -> Prepared:
    n, d = (100_000 if quick else 1_000_000), 128
    database, queries = data.vectors(n, d), data.vectors(batch, d, seed=1)
    mask = np.random.default_rng(3).random(n) < share
    bits, rows = np.packbits(mask, bitorder="little"), np.flatnonzero(mask)

    def check():
        scores, ids = scan.knn(queries, database, K, filter=bits)
        places = np.searchsorted(rows, ids)
        expect.equal(rows[places], ids, what="ids, of rows that pass")
        expect.neighbours((scores, places), queries, database[rows], K, "ip")

    peers = {}
    faiss, index = data.installed("faiss"), faiss_flat(database, "ip")
    if faiss is not None and index is not None:
        some = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        peers["faiss"] = lambda: index.search(queries, K, params=some)
    return Prepared(
        ours=lambda: scan.knn(queries, database, K, filter=bits),
        check=check,
        peers=peers,
        bytes=4.0 * len(rows) * d + n / 8,
        flops=2.0 * batch * len(rows) * d,
        work=batch,
        unit="queries",
    )


def _pq(batch: int, quick: bool) -> Prepared:
    n, m, dsub = (100_000 if quick else 1_000_000), 16, 8
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (n, m), dtype=np.uint8)
    books = rng.standard_normal((m, 256, dsub), dtype=np.float32)
    queries = data.vectors(batch, m * dsub, seed=1)

    def tables():
        return ((queries.reshape(batch, m, 1, dsub) - books) ** 2).sum(-1)

    def by_numpy():
        look = tables()
        scores = np.zeros((batch, n), np.float32)
        for j in range(m):
            scores += look[:, j, codes[:, j]]
        part = np.argpartition(scores, K, axis=1)[:, :K]
        best = np.take_along_axis(scores, part, 1)
        order = np.argsort(best, axis=1)
        return np.take_along_axis(best, order, 1), np.take_along_axis(part, order, 1)

    def check():
        scores, ids = scan.pq(queries, codes, books, K)
        expect.close(scores, by_numpy()[0], rtol=1e-4, what="scores")
        rows = books[np.arange(m), codes[ids[0]]].reshape(K, m * dsub)
        expect.close(
            ((queries[0] - rows) ** 2).sum(1), scores[0], rtol=1e-4, what="scores of the returned ids"
        )

    peers = {"numpy": by_numpy} if batch * n <= 4_000_000 else {}
    torch = data.installed("torch")
    if torch is not None:
        tcodes = torch.from_numpy(codes.astype(np.int64).T.copy())

        def by_torch():
            look = torch.from_numpy(tables())
            scores = look[:, 0].index_select(1, tcodes[0])
            for j in range(1, m):
                scores += look[:, j].index_select(1, tcodes[j])
            return scores.topk(K, dim=1, largest=False)

        if batch * n <= 20_000_000:
            peers["torch"] = by_torch
    faiss = data.installed("faiss")
    if faiss is not None:
        faiss.omp_set_num_threads(get_num_threads())
        index = faiss.IndexPQ(m * dsub, m, 8)
        faiss.copy_array_to_vector(books.ravel(), index.pq.centroids)
        faiss.copy_array_to_vector(codes.ravel(), index.codes)
        index.is_trained, index.ntotal = True, n
        peers["faiss"] = lambda: index.search(queries, K)
    return Prepared(
        ours=lambda: scan.pq(queries, codes, books, K),
        check=check,
        peers=peers,
        bytes=float(n * m),
        flops=float(batch * n * m),
        work=batch,
        unit="queries",
    )


def _maxsim(dtype: str, quick: bool) -> Prepared:
    """32 query tokens, documents of 80 to 300 tokens; torch pads them to the longest."""
    documents, tokens, d = (100 if quick else 1000), 32, 128
    rng = np.random.default_rng(0)
    lengths = rng.integers(80, 301, documents)
    ptr = np.concatenate([[0], np.cumsum(lengths)])
    n = int(ptr[-1])
    x, q, q_ptr = data.vectors(n, d).astype(dtype), data.vectors(tokens, d, seed=1), np.array([0, tokens])

    def check():
        best = np.maximum.reduceat(q @ x.astype(np.float32).T, ptr[:-1], axis=1)
        expect.close(scan.maxsim(q, q_ptr, x, ptr)[0], best.sum(0), rtol=1e-4, what="scores")

    peers = {}
    torch = data.installed("torch")
    if torch is not None:
        padded = torch.zeros((documents, 300, d), dtype=getattr(torch, dtype))
        here = torch.arange(300) < torch.from_numpy(lengths)[:, None]
        padded[here] = torch.from_numpy(x)
        tq = torch.from_numpy(q).to(padded.dtype)

        def by_torch():
            similarity = torch.einsum("td,npd->ntp", tq, padded)
            return similarity.masked_fill(~here[:, None], -torch.inf).amax(2).sum(1)

        peers["torch"] = by_torch
    return Prepared(
        ours=lambda: scan.maxsim(q, q_ptr, x, ptr),
        check=check,
        peers=peers,
        bytes=float(x.nbytes),
        flops=2.0 * tokens * n * d,
        work=documents,
        unit="documents",
    )


CASES = [
    Case("knn ip, 1 query", "scan", partial(_knn, 1, "ip")),
    Case("knn ip, 16 queries", "scan", partial(_knn, 16, "ip")),
    Case("knn ip, 1024 queries", "scan", partial(_knn, 1024, "ip")),
    Case("knn l2, 16 queries", "scan", partial(_knn, 16, "l2")),
    Case("knn l2, 1024 queries", "scan", partial(_knn, 1024, "l2"), full_only=True),
    Case("knn ip float16, 1 query", "scan", partial(_half, 1)),
    Case("knn ip, 1 row in 100 passes, 16 queries", "scan", partial(_filtered, 16, 0.01)),
    Case("pq 16 x 8 bits, 1 query", "scan", partial(_pq, 1)),
    Case("pq 16 x 8 bits, 64 queries", "scan", partial(_pq, 64)),
    Case("maxsim, 32 query tokens", "scan", partial(_maxsim, "float32")),
    Case("maxsim float16, 32 query tokens", "scan", partial(_maxsim, "float16")),
]
