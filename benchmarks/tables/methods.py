"""What a training step of each method of `lutra.nn` costs on a large table.

``python -m tables.methods`` in benchmarks/ prints it: forward and backward of one call, medians of process
time on one thread, calls taking turns. ``dense`` is ``torch.nn.Embedding``, ``plain`` PEP's formula in
torch's own ops on the whole table, as its published code has it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lutra import nn

METHODS = {
    "PEP, a threshold a row": ("PEPEmbedding", {}),
    "PEP, for each entry": ("PEPEmbedding", {"granularity": "both"}),
    "DeepLight": ("DeepLightEmbedding", {}), "AutoSrh": ("AutoSrhEmbedding", {}),
    "OptEmbed": ("OptEmbedding", {}), "AutoDim": ("AutoDimEmbedding", {}), "VTrans": ("VTransEmbedding", {}),
    "DPQ": ("DPQEmbedding", {}), "DPQ, softmax": ("DPQEmbedding", {"variant": "softmax"}),
    "MGQE": ("MGQEEmbedding", {}), "QLAE": ("QLAEEmbedding", {}),
}  # fmt: skip


def plain_pep(layer, ids):
    w, s = layer.weight, layer.threshold
    return torch.nn.functional.embedding(ids, torch.sign(w) * torch.relu(w.abs() - torch.sigmoid(s)))


def step(call, layer, ids):
    layer.zero_grad(set_to_none=True)
    out = call(ids).sum()
    (out + nn.regularization(layer)).backward()


def rows(size: int, dim: int, n: int, repeats: int):
    """(name, milliseconds of lutra, of torch's plain embedding, of the plain form or None)."""
    ids = torch.randint(0, size, (n,))
    dense = torch.nn.Embedding(size, dim)
    for name, (cls, method) in METHODS.items():
        layer = getattr(nn, cls).from_pretrained(dense.weight.detach(), freeze=False, **method)
        calls = {"lutra": (layer, layer), "dense": (dense, dense)}
        if name.startswith("PEP"):
            calls["plain"] = (lambda ids, layer=layer: plain_pep(layer, ids), layer)
        times: dict[str, list[float]] = {key: [] for key in calls}
        for call, owner in calls.values():  # warm, and the same result
            step(call, owner, ids)
        if "plain" in calls:
            torch.testing.assert_close(layer(ids), plain_pep(layer, ids))
        for _ in range(repeats):
            for key, (call, owner) in calls.items():
                begin = time.process_time()
                step(call, owner, ids)
                times[key].append(1e3 * (time.process_time() - begin))
        medians = {key: statistics.median(found) for key, found in times.items()}
        yield name, *(medians.get(key) for key in ("lutra", "dense", "plain"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ids", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{given.rows} x {given.dim}, {given.ids} ids, milliseconds, forward and backward\n")
    print(f"{'method':24} {'lutra':>8} {'dense':>8} {'plain':>8}")
    for name, *times in rows(given.rows, given.dim, given.ids, given.repeats):
        print(f"{name:24}", *(f"{'':>8}" if t is None else f"{t:8.1f}" for t in times), flush=True)


if __name__ == "__main__":
    main()
