"""lutra.gather.tables on CUDA against the reference; bags are in test_cuda_bag*.py."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import FLOATS, close, rounded, same_bits

import lutra
from lutra.reference import gather as reference


@pytest.mark.parametrize("dtype", FLOATS)
def test_tables(gpu, dtype):
    rng = np.random.default_rng(0)
    for tokens in (1, 3, 33, 1100):
        for n_tables, entries, dim in ((1, 2, 1), (5, 16, 33), (64, 8, 24), (7, 256, 100)):
            t = rounded(rng.standard_normal((n_tables, entries, dim)).astype(np.float32), dtype)
            codes = rng.integers(0, entries, (tokens, n_tables)).astype(np.int32)
            weights = rng.standard_normal((tokens, n_tables)).astype(np.float32)
            bias = rounded(rng.standard_normal(dim).astype(np.float32), dtype)
            on_gpu = [gpu.put(t, dtype), gpu.put(codes), gpu.put(weights), gpu.put(bias, dtype)]
            with gpu.no_sync():
                full, plain = lutra.gather.tables(*on_gpu), lutra.gather.tables(*on_gpu[:2])
            close(gpu.get(full), reference.tables(t, codes, weights, bias), dtype, 4)
            close(gpu.get(plain), reference.tables(t, codes), dtype, 4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tables_with_many_tokens(gpu, dtype):
    """Enough tokens and columns that tables go through shared memory; ragged at both ends."""
    rng = np.random.default_rng(0)
    for tokens, n_tables, entries, dim in ((1100, 9, 16, 4104), (2100, 17, 256, 3208), (600, 3, 200, 8200)):
        t = rounded(rng.standard_normal((n_tables, entries, dim)).astype(np.float32), dtype)
        codes = rng.integers(0, entries, (tokens, n_tables)).astype(np.int32)
        weights = rng.standard_normal((tokens, n_tables)).astype(np.float32)
        bias = rounded(rng.standard_normal(dim).astype(np.float32), dtype)
        bad = codes.copy()
        bad[5, 2], bad[tokens - 1, 0] = entries, -1
        for w, b in ((weights, bias), (None, None)):
            arrays = (gpu.put(bad), gpu.put(w), gpu.put(b, dtype))
            out = gpu.get(lutra.gather.tables(gpu.put(t, dtype), *arrays))
            assert np.isnan(out[[5, tokens - 1]]).all()
            rest = np.setdiff1d(np.arange(tokens), [5, tokens - 1])
            want = reference.tables(t, codes[rest], None if w is None else w[rest], b)
            close(out[rest], want, dtype, 4)


def test_a_code_outside_its_table_makes_the_token_nan(gpu):
    t, codes = np.ones((3, 4, 9), np.float32), np.zeros((5, 3), np.int32)
    codes[1, 2], codes[3, 0] = 4, -1
    out = gpu.get(lutra.gather.tables(gpu.put(t), gpu.put(codes)))
    assert np.isnan(out[[1, 3]]).all() and (out[[0, 2, 4]] == 3).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_tables_gradients(gpu_torch, dtype):
    torch, rng = gpu_torch.torch, np.random.default_rng(0)
    for tokens, n_tables, entries, dim in ((1, 1, 2, 1), (33, 5, 16, 33), (300, 4, 256, 64), (2000, 3, 2, 8)):
        t = rounded(rng.standard_normal((n_tables, entries, dim)).astype(np.float32), dtype)
        codes = rng.integers(0, entries, (tokens, n_tables)).astype(np.int32)
        weights = rng.standard_normal((tokens, n_tables)).astype(np.float32)
        g = rounded(rng.standard_normal((tokens, dim)).astype(np.float32), dtype)
        a, w = gpu_torch.put(t, dtype).requires_grad_(), gpu_torch.put(weights).requires_grad_()
        c, up = gpu_torch.put(codes), gpu_torch.put(g, dtype)
        with gpu_torch.no_sync():
            out = lutra.gather.tables(a, c, w)
            to_tables, to_weights = torch.autograd.grad(out, (a, w), up)
        want_tables, want_weights = reference.tables_backward(g, t, codes, weights)
        close(gpu_torch.get(to_tables), want_tables, dtype, 4)
        close(gpu_torch.get(to_weights), want_weights, "float32", 4)
        again = torch.autograd.grad(lutra.gather.tables(a, c, w), (a, w), up)
        same_bits(gpu_torch.get(to_tables), gpu_torch.get(again[0]))
        same_bits(gpu_torch.get(to_weights), gpu_torch.get(again[1]))
