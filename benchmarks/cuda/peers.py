"""Exact search against FAISS on a GPU and cuVS, where they are installed.

Both take float32 and float16 and return squared distances or products, as lutra does. A library that is
not there, or whose build has no GPU, gives no cases: `missing` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from exact import search
from harness import Case

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

    def find(q, x, k, metric):
        return faiss.knn_gpu(resources, q, x, k, metric=codes[metric])

    return f"faiss {faiss.__version__}", find


def cuvs_search() -> tuple[str, Search]:
    import cuvs
    from cuvs.common import Resources
    from cuvs.neighbors import brute_force

    names = {"ip": "inner_product", "l2": "sqeuclidean"}
    built: dict[tuple[int, str], Any] = {}  # rows' norms are taken once, as in use

    def find(q, x, k, metric):
        resources = Resources(stream=torch.cuda.current_stream().cuda_stream)
        key = x.data_ptr(), metric
        if key not in built:
            built.clear()
            built[key] = brute_force.build(x, metric=names[metric], resources=resources)
        scores = torch.empty(len(q), k, device=q.device)
        ids = torch.empty(len(q), k, dtype=torch.int64, device=q.device)
        brute_force.search(built[key], q, k, neighbors=ids, distances=scores, resources=resources)
        return scores, ids

    return f"cuvs {cuvs.__version__}", find


def cases(scale: int) -> Iterator[Case]:
    for library, load in (("faiss", faiss_search), ("cuvs", cuvs_search)):
        try:
            name, theirs = load()
        except (ImportError, OSError, AttributeError) as e:
            missing[library] = str(e)
            continue
        for n in (1_000_000 // scale, 10_000_000 // scale):
            for dtype in (torch.float32, torch.float16):
                for nq, k in ((1, 10), (128, 10), (1024, 10), (1024, 100)):
                    for metric in METRICS:
                        yield search(n, dtype, nq, k, metric, theirs, name)
