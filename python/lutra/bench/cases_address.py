"""Cases of `lutra.address`."""

from __future__ import annotations

import importlib

import numpy as np

from .. import address, reference
from ..address._fwht import _levels as hadamard_levels
from . import data, expect
from .case import Case, Prepared
from .cases_scan import faiss_flat, numpy_knn, torch_knn


def _nearest(quick: bool) -> Prepared:
    n, d, centroids = (20_000 if quick else 100_000), 128, 1024
    x, c = data.vectors(n, d), data.vectors(centroids, d, seed=1)
    block = max(1, (1 << 27) // centroids)

    def by_numpy():
        return [numpy_knn(x[i : i + block], c, 1, "l2") for i in range(0, n, block)]

    peers = {"numpy": by_numpy}
    torch = data.installed("torch")
    if torch is not None:
        tensors = torch.from_numpy(x), torch.from_numpy(c)
        peers["torch"] = lambda: torch_knn(*tensors, 1, "l2")
    index = faiss_flat(c, "l2")
    if index is not None:
        peers["faiss"] = lambda: index.search(x, 1)
    return Prepared(
        ours=lambda: address.nearest(x, c),
        check=lambda: expect.neighbours(address.nearest(x, c), x, c, 1, "l2", most=200),
        peers=peers,
        bytes=4.0 * n * d,
        flops=2.0 * n * d * centroids,
        work=n,
        unit="vectors",
    )


def torch_sign_hash(x, bits: int):
    """The sign hash in torch's own operations."""
    import torch

    z = x.view(*x.shape[:-1], -1, bits)
    powers = 2 ** torch.arange(bits)
    return ((z >= 0) * powers).sum(-1), torch.sigmoid(2 * z.abs()).prod(-1)


def _sign_hash(quick: bool) -> Prepared:
    rows, d, bits = (1024 if quick else 8192), 4096, 8
    x = data.vectors(rows, d)

    def check():
        got, want = address.sign_hash(x[:64], bits), reference.address.sign_hash(x[:64], bits)
        expect.equal(got.codes, want[0], what="codes")
        expect.close(got.weights, want[1], what="weights")

    peers = {"numpy": lambda: reference.address.sign_hash(x, bits)}
    torch = data.installed("torch")
    if torch is not None:
        tensor = torch.from_numpy(x)
        peers["torch"] = lambda: torch_sign_hash(tensor, bits)
    return Prepared(
        ours=lambda: address.sign_hash(x, bits),
        check=check,
        peers=peers,
        bytes=4.0 * rows * d + 8.0 * rows * d / bits,
        work=4.0 * rows * d,
        unit="B",
    )


def _fwht(quick: bool) -> Prepared:
    rows, n = (512 if quick else 8192), 1024
    x = data.vectors(rows, n)

    def check():
        expect.close(
            address.fwht(x[:64]), reference.address.fwht(x[:64]), what="transform", rtol=1e-4, atol=1e-3
        )

    peers = {"numpy": lambda: reference.address.fwht(x)}
    torch = data.installed("torch")
    if torch is not None:
        tensor = torch.from_numpy(x)
        peers["torch"] = lambda: hadamard_levels(torch, tensor, n, 1.0)
    return Prepared(
        ours=lambda: address.fwht(x),
        check=check,
        peers=peers,
        bytes=8.0 * rows * n,
        flops=10.0 * rows * n,
        work=8.0 * rows * n,
        unit="B",
    )


def _ngrams(quick: bool) -> Prepared:
    texts = data.texts(1_000_000 if quick else 4_000_000)
    size = sum(len(t.encode()) for t in texts)
    few = texts[: len(texts) // 20]

    def check():
        got, want = address.ngrams(few), reference.address.ngrams(few)
        expect.equal(got[0], want[0], what="ids")
        expect.equal(got[1], want[1], what="offsets")

    peers = {"numpy": lambda: reference.address.ngrams(texts)}
    if data.installed("sklearn") is not None:
        extraction = importlib.import_module("sklearn.feature_extraction.text")
        vectorizer = extraction.HashingVectorizer(  # words and pairs too; it also counts them
            ngram_range=(1, 2), n_features=2**21, norm=None, alternate_sign=False
        )
        peers["scikit-learn"] = lambda: vectorizer.transform(texts)
    return Prepared(
        ours=lambda: address.ngrams(texts),
        check=check,
        peers=peers,
        bytes=float(size),
        work=size,
        unit="B",
    )


def _token_ngrams(quick: bool) -> Prepared:
    n = 200_000 if quick else 2_000_000
    tokens = np.random.default_rng(5).integers(0, 50_000, (n // 100, 100))

    def by_numpy():
        with np.errstate(over="ignore"):
            t = tokens.astype(np.uint64)
            h = (t[:, :-1] * np.uint64(116049371) + t[:, 1:]) % np.uint64(1_000_000)
        return np.concatenate([tokens, h.astype(np.int64)], 1)

    def check():
        ids, offsets = address.token_ngrams(tokens, order=2, buckets=1_000_000)
        expect.equal(np.asarray(ids).reshape(len(tokens), -1), by_numpy(), what="ids")
        assert len(offsets) == len(tokens)

    return Prepared(
        ours=lambda: address.token_ngrams(tokens, order=2, buckets=1_000_000),
        check=check,
        peers={"numpy": by_numpy},
        bytes=8.0 * n * 3,
        work=n,
        unit="tokens",
    )


CASES = [
    Case("nearest of 1024 centroids", "address", _nearest),
    Case("sign_hash, 8 bits", "address", _sign_hash),
    Case("fwht of 1024 values", "address", _fwht),
    Case("ngrams of text", "address", _ngrams),
    Case("token_ngrams, order 2", "address", _token_ngrams),
]
