"""Exact search against FAISS on a GPU and cuVS, where they are installed.

Both take float32 and float16 and return squared distances or products, as lutra does. A library that is
not there, or whose build has no GPU, gives no cases: `missing` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from exact import DIMS
from harness import Case, same_neighbours

import lutra

Search = Callable[[torch.Tensor, torch.Tensor, int, str], tuple[torch.Tensor, torch.Tensor]]
METRICS = ("ip", "l2")
missing: dict[str, str] = {}  # libraries without cases


def faiss_search() -> tuple[str, Search]:
    import faiss
    import faiss.contrib.torch_utils  # torch tensors, on torch's stream

    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this build of faiss has no GPU")
    resources = faiss.StandardGpuResources()
    codes = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}

    def search(q, x, k, metric):
        return faiss.knn_gpu(resources, q, x, k, metric=codes[metric])

    return f"faiss {faiss.__version__}", search


def cuvs_search() -> tuple[str, Search]:
    import cuvs
    from cuvs.common import Resources
    from cuvs.neighbors import brute_force

    names = {"ip": "inner_product", "l2": "sqeuclidean"}
    built: dict[tuple[int, str], Any] = {}  # rows' norms are taken once, as in use

    def search(q, x, k, metric):
        resources = Resources(stream=torch.cuda.current_stream().cuda_stream)
        key = x.data_ptr(), metric
        if key not in built:
            built.clear()
            built[key] = brute_force.build(x, metric=names[metric], resources=resources)
        scores = torch.empty(len(q), k, device=q.device)
        ids = torch.empty(len(q), k, dtype=torch.int64, device=q.device)
        brute_force.search(built[key], q, k, neighbors=ids, distances=scores, resources=resources)
        return scores, ids

    return f"cuvs {cuvs.__version__}", search


def case(name: str, theirs: Search, n: int, dtype: torch.dtype, nq: int, k: int, metric: str) -> Case:
    def build():
        x = torch.randn(n, DIMS, device="cuda").to(dtype)
        q = [(torch.randn(nq, DIMS, device="cuda").to(dtype),) for _ in range(2)]
        return lambda q: lutra.scan.knn(q, x, k, metric), q, lambda q: theirs(q, x, k, metric)

    kind = str(dtype).removeprefix("torch.")
    return Case(
        f"{name}: knn {n}x{DIMS} {kind} {metric}, batch {nq}, k {k}",
        None,
        [],
        check=same_neighbours,
        bytes=n * DIMS * dtype.itemsize,
        flops=2 * nq * n * DIMS,
        rate="bf16" if dtype == torch.float16 else "fp32",
        build=build,
        peer=name.split()[0],
    )


def cases(scale: int) -> Iterator[Case]:
    for library, load in (("faiss", faiss_search), ("cuvs", cuvs_search)):
        try:
            name, search = load()
        except (ImportError, OSError, AttributeError) as e:
            missing[library] = str(e)
            continue
        for n in (1_000_000 // scale, 10_000_000 // scale):
            for dtype in (torch.float32, torch.float16):
                for nq, k in ((1, 10), (128, 10), (1024, 10), (1024, 100)):
                    for metric in METRICS:
                        yield case(name, search, n, dtype, nq, k, metric)
