"""Addresses: n-grams, product keys, random rows, codes; MaxSim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from harness import Case, near

import lutra
from lutra.torch_ops.product_keys import compose as torch_product_keys
from lutra.torch_ops.random_rows import compose as torch_random_rows

#: (queries, documents): one query reads the documents, many multiply them.
SIZES = ((1, 1 << 17), (256, 1 << 13))
TOKENS, LENGTH, D = 32, 128, 128


def same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours, theirs)


def _ptr(n: int, each: int) -> torch.Tensor:
    return torch.arange(n + 1, device="cuda") * each


def _padded_maxsim(q: torch.Tensor, x: torch.Tensor, queries: int) -> torch.Tensor:
    """The same by torch: all similarities, some queries at a time."""
    out, docs = [], x.shape[0] // LENGTH
    step = max(1, (1 << 28) // (TOKENS * x.shape[0]))
    for i in range(0, queries, step):
        part = q[i * TOKENS : (i + step) * TOKENS]
        similarity = (part @ x.T).view(-1, TOKENS, docs, LENGTH)
        out.append(similarity.amax(-1).float().sum(1))
    return torch.cat(out)


def _maxsim(types: tuple[str, str], queries: int, docs: int, k: int | None = None) -> Case:
    def build() -> tuple[Any, ...]:
        q = torch.randn(queries * TOKENS, D, device="cuda")
        x = torch.randn(docs * LENGTH, D, device="cuda", dtype=torch.float16)
        q = torch.nn.functional.normalize(q, dim=1)
        scale = None
        if types[1] == "int8":
            scale = torch.full((docs * LENGTH,), 1 / 127, device="cuda")
            for part in x.split(1 << 20):
                part.mul_(30).round_().clamp_(-127, 127)
            if types[0] == "int8":
                q = (q * 300).round().clamp(-127, 127)
        a, b = (t.to(getattr(torch, name)) for t, name in zip((q, x), types))
        del x
        ptrs = _ptr(queries, TOKENS), _ptr(docs, LENGTH)

        def ours(a: torch.Tensor, b: torch.Tensor) -> Any:
            return lutra.scan.maxsim(a, ptrs[0], b, ptrs[1], doc_scale=scale, k=k)

        def theirs(a: torch.Tensor, b: torch.Tensor) -> Any:
            if types[1] == "int8":
                b = b.to(torch.float16)
            scores = _padded_maxsim(a.to(b.dtype), b, queries)
            if scale is not None:
                scores = scores / 127
            return scores if k is None else scores.topk(k).values

        return ours, [(a, b)], theirs

    size = {"float32": 4, "int8": 1}.get(types[1], 2)
    tolerance = {"float32": 1e-5, "int8": 1e-2}.get(types[1], 1e-2)

    def check(ours: Any, theirs: Any) -> None:
        near(tolerance, tolerance * TOKENS)(ours if k is None else ours.scores, theirs)

    return Case(
        f"maxsim {types[0]} x {types[1]}, {queries} queries, {docs} documents" + (f", k {k}" if k else ""),
        None, [], check=check, build=build, bytes=docs * LENGTH * D * size,
        flops=2 * queries * TOKENS * docs * LENGTH * D, rate="bf16" if size < 4 else "fp32",
    )  # fmt: skip


def _residual(bits: int, docs: int) -> Case:
    def build() -> tuple[Any, ...]:
        q = torch.nn.functional.normalize(torch.randn(TOKENS, D, device="cuda"), dim=1)
        n, centroids = docs * LENGTH, 1 << 14
        tokens = lutra.scan.ResidualTokens(
            torch.randint(0, 256, (n, D * bits // 8), device="cuda", dtype=torch.uint8),
            torch.randint(0, centroids, (n,), device="cuda", dtype=torch.int32),
            torch.randn(centroids, D, device="cuda"), torch.randn(1 << bits, device="cuda"), True,
        )  # fmt: skip
        ptrs = _ptr(1, TOKENS), _ptr(docs, LENGTH)
        return lambda q: lutra.scan.maxsim(q, ptrs[0], tokens, ptrs[1]), [(q,)], None

    return Case(
        f"maxsim float32 x residual codes of {bits} bits, 1 query, {docs} documents", None, [], build=build,
        bytes=docs * LENGTH * (D * bits // 8 + 4), flops=2 * TOKENS * docs * LENGTH * D,
    )  # fmt: skip


def _product_keys(dtype: str, n: int, k: int, tokens: int, heads: int = 4, half: int = 128) -> Case:
    def build() -> tuple[Any, ...]:
        t = getattr(torch, dtype)
        q = [(torch.randn(tokens, heads, 2 * half, device="cuda", dtype=t),) for _ in range(3)]
        keys = torch.randn(heads, 2, n, half, device="cuda", dtype=t)
        return (
            lambda q: lutra.address.product_keys(q, keys, k),
            q,
            lambda q: torch_product_keys(q, keys, k),
        )

    return Case(
        f"product_keys {dtype} n {n}, k {k}, {tokens} x {heads}", None, [], build=build,
        check=lambda a, b: near(1e-3, 1e-3)(a.scores, b[0]),
        bytes=2 * tokens * heads * 2 * n * 4, flops=2 * tokens * heads * 2 * n * half,
        rate="fp32" if dtype == "float32" else "bf16",
    )  # fmt: skip


def cases(scale: int) -> Iterator[Case]:
    for types in (
        ("bfloat16", "bfloat16"), ("float16", "float16"), ("int8", "int8"), ("float32", "int8"),
        ("float32", "float32"), ("float32", "bfloat16"),
    ):  # fmt: skip
        for queries, docs in SIZES:
            yield _maxsim(types, queries, docs // scale)
    yield _maxsim(("bfloat16", "bfloat16"), 1, (1 << 17) // scale, k=10)
    yield _maxsim(("bfloat16", "bfloat16"), 256, (1 << 13) // scale, k=10)
    for bits in (2, 4):
        yield _residual(bits, (1 << 16) // scale)

    yield _product_keys("float32", 1024, 32, 16384 // scale)
    yield _product_keys("bfloat16", 1024, 32, 16384 // scale)
    yield _product_keys("bfloat16", 512, 128, 16384 // scale)

    ids = [(torch.randint(0, 1 << 20, (1 << 20 >> (scale > 1) * 3,), device="cuda"),) for _ in range(3)]
    n = ids[0][0].numel()
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        yield Case(
            f"random_rows {dtype} 256, {n} tokens",
            lambda i, dtype=dtype: lutra.address.random_rows(i, 256, dtype=dtype), ids, bytes=n * 256 * size,
        )  # fmt: skip
    few = [(i[0][: n // 16],) for i in ids]
    yield Case(
        f"random_rows float32 256, {n // 16} tokens, against torch",
        lambda i: lutra.address.random_rows(i, 256), few,
        lambda i: torch_random_rows(i, None, 256), near(1e-5, 1e-5), bytes=n // 16 * 256 * 4,
    )  # fmt: skip

    tokens = [(torch.randint(0, 30000, (16384 // scale, 256), device="cuda"),) for _ in range(3)]
    n = tokens[0][0].numel()
    for order in (2, 3):
        yield Case(
            f"token_ngrams order {order}, 256 a text",
            lambda t, order=order: lutra.address.token_ngrams(t, order=order, buckets=2_000_000).ids,
            tokens, bytes=n * 8 * (1 + order),
        )  # fmt: skip
    offsets = torch.arange(0, n, 256, device="cuda")
    flat = [(t[0].reshape(-1),) for t in tokens]
    yield Case(
        "token_ngrams order 2, 256 a text, ragged (waits for the device)",
        lambda t: lutra.address.token_ngrams(t, offsets, buckets=2_000_000).ids, flat, bytes=n * 8 * 3,
    )  # fmt: skip
    from lutra.address._xor_ngrams import composition as torch_xor

    moduli = [999983 + 2 * j for j in range(16)]
    small = [(t[0][: 4096 // scale],) for t in tokens]
    m = small[0][0].numel()
    yield Case(
        "xor_ngrams orders 2, 3, 8 heads each",
        lambda t: lutra.address.xor_ngrams(t, [7919, 104729, 1299709], moduli, [2, 3]), small,
        lambda t: torch_xor(t, [7919, 104729, 1299709], moduli, [2, 3], 0), same, bytes=m * 8 * 17,
    )  # fmt: skip

    from lutra.address._longest_match import composition as torch_match

    rng = np.random.default_rng(0)
    grams = {tuple(rng.zipf(1.3, rng.integers(2, 4)).clip(0, 29999).tolist()) for _ in range(100_000)}
    vocabulary = lutra.vocab.FGrams(sorted(grams))
    zipf = [(torch.from_numpy(rng.zipf(1.3, (8192 // scale, 256)).clip(0, 29999)).cuda(),) for _ in range(2)]
    m = zipf[0][0].numel()
    starts = np.arange(0, m + 1, 256)
    table = vocabulary.table_for(zipf[0][0])

    def equal(ours: Any, theirs: Any) -> None:
        same(ours[0], theirs[0])
        same(ours[1], theirs[1])

    yield Case(
        "longest_match, 100,000 n-grams, 256 a text",
        lambda t: lutra.address.longest_match(t, vocabulary), zipf,
        lambda t: torch_match(t, starts, table, len(vocabulary), vocabulary.max_length), equal,
        bytes=m * (8 + 12 + 64),
    )  # fmt: skip

    yield from _codes(scale)


def _codes(scale: int) -> Iterator[Case]:
    from lutra.address._fwht import _levels as torch_fwht
    from lutra.address._hash_features import composition as torch_features

    n, d = (1 << 20) // scale, 1024
    for dtype in ("float32", "bfloat16"):
        x = [(torch.randn(n // 4, d, device="cuda", dtype=getattr(torch, dtype)),) for _ in range(2)]
        size = x[0][0].numel() * x[0][0].element_size()
        yield Case(f"binarize {dtype} {d}", lutra.address.binarize, x, bytes=size * (1 + 1 / 32))

        def theirs(x: torch.Tensor) -> torch.Tensor:
            return torch_fwht(torch, x, d, d**-0.5)

        yield Case(
            f"fwht {dtype} {d}", lambda x: lutra.address.fwht(x, d**-0.5), x, theirs, near(2e-2, 2e-2),
            bytes=2 * size,
        )  # fmt: skip
    ids = [(torch.randint(0, 1 << 32, (n // 16,), device="cuda"),) for _ in range(3)]
    yield Case(
        "hash_features 1024", lambda i: lutra.address.hash_features(i, 1024), ids,
        lambda i: torch_features(i, 1024, 1_000_000, 0), same, bytes=n // 16 * 1024 * 4,
    )  # fmt: skip

    planes = torch.randn(20, 128, 5, device="cuda")
    x = [(torch.randn(n // 2, 128, device="cuda"),) for _ in range(2)]
    yield Case(
        "simhash 128, 20 x 5 planes", lambda x: lutra.address.simhash(x, planes), x, bytes=n // 2 * 512,
        flops=2 * n // 2 * 128 * 100,
    )  # fmt: skip

    sample = torch.randn(20_000, 128).numpy()
    for quantizer in (lutra.quant.PQ(128, 16), lutra.quant.RQ(128, 8, beam=5)):
        name = type(quantizer).__name__
        # The codebooks' values do not matter here.
        books = np.ascontiguousarray(sample[: quantizer.m * 256])
        shape = (16, 256, 8) if name == "PQ" else (8, 256, 128)
        quantizer._codebooks = np.ascontiguousarray(books.reshape(-1)[: np.prod(shape)].reshape(shape))
        rows = [(x[0][0][: n // 2 if name == "PQ" else n // 16],)]
        count = rows[0][0].shape[0]
        flops = 2 * count * 128 * 256 * (1 if name == "PQ" else 8)
        yield Case(f"{name}.encode 128, {count} rows", quantizer.encode, rows, bytes=count * 512, flops=flops)

    tokens = torch.nn.functional.normalize(torch.randn(4096 // scale * 32, 128, device="cuda"), dim=1)
    yield Case(
        "ball_carving 32 x 128 (waits for the device)",
        lambda t: lutra.address.ball_carving(t, _ptr(t.shape[0] // 32, 32))[0], [(tokens,)],
        bytes=2 * tokens.numel() * 4,
    )  # fmt: skip
