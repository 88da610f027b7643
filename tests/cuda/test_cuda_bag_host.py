"""Tables in page-locked host memory, read by the kernel, against the same layer on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from bag_data import MODES, make_ids
from gpu_arrays import FLOATS, close

import lutra.nn


def pair(gpu_torch, make, dtype):
    """The layer on the CPU, and one whose table the GPU reads."""
    torch = gpu_torch.torch
    table = torch.from_numpy(np.random.default_rng(0).standard_normal((70, 24)).astype(np.float32))
    layers = [make(table.to(getattr(torch, dtype)).clone()) for _ in range(2)]
    layers[1].pin_table()
    assert layers[1].table.is_pinned() and layers[1]._by_kernel(torch.zeros(1, 1, dtype=torch.int64).cuda())
    return layers


def same_gradients(gpu_torch, layers, dtype):
    grads = [layer.table.grad for layer in layers]
    dense = [g.to_dense() if g.is_sparse else g for g in grads]
    assert not grads[1].is_cuda and grads[0].is_sparse == grads[1].is_sparse
    close(gpu_torch.get(dense[1]), gpu_torch.get(dense[0]), dtype, 4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_embedding(gpu_torch, dtype):
    torch, nn = gpu_torch.torch, lutra.nn
    for sparse in (True, False):
        layers = pair(
            gpu_torch,
            lambda t, sparse=sparse: nn.HostEmbedding.from_pretrained(
                t, freeze=False, padding_idx=3, sparse=sparse
            ),
            dtype,
        )
        ids = torch.from_numpy(np.random.default_rng(1).integers(0, 70, (6, 11)))
        outs = [layers[0](ids), layers[1](ids.cuda())]
        assert outs[1].is_cuda and outs[1].shape == outs[0].shape
        close(gpu_torch.get(outs[1]), gpu_torch.get(outs[0]), dtype)
        for out in outs:
            out.float().square().sum().backward()
        same_gradients(gpu_torch, layers, dtype)
        some = gpu_torch.put(np.zeros((2, 2), np.int64))
        with torch.no_grad(), gpu_torch.no_sync():
            layers[1](some)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bags(gpu_torch, dtype, mode):
    torch, nn = gpu_torch.torch, lutra.nn
    for layout in ("fixed", "offsets", "last"):
        ids, offsets, last = make_ids(70, layout)
        layers = pair(
            gpu_torch,
            lambda t, last=last: nn.HostEmbeddingBag.from_pretrained(
                t, freeze=False, mode=mode, padding_idx=5, include_last_offset=last
            ),
            dtype,
        )
        w = np.random.default_rng(2).standard_normal(ids.shape).astype(np.float32) if mode == "sum" else None
        outs, weights = [], []
        for layer, there in zip(layers, ("cpu", "cuda")):
            i, o = (None if a is None else torch.from_numpy(a).to(there) for a in (ids, offsets))
            v = None
            if w is not None:
                v = torch.from_numpy(w).to(there, getattr(torch, dtype)).requires_grad_()
            outs.append(layer(i, o, v))
            weights.append(v)
            outs[-1].float().square().sum().backward()
        close(gpu_torch.get(outs[1]), gpu_torch.get(outs[0]), dtype, 4)
        same_gradients(gpu_torch, layers, dtype)
        if w is not None:
            close(gpu_torch.get(weights[1].grad), gpu_torch.get(weights[0].grad), dtype, 8)


def test_ids_out_of_range_and_the_model_in_another_type(gpu_torch):
    torch = gpu_torch.torch
    layers = pair(gpu_torch, lambda t: lutra.nn.HostEmbedding.from_pretrained(t), "float32")
    layer = layers[1].to(torch.bfloat16)
    out = layer(torch.tensor([1, 70, -1], device="cuda"))
    assert out.dtype == torch.bfloat16 and layer.table.dtype == torch.float32
    assert torch.isnan(out).all(1).tolist() == [False, True, True]
