"""Every torch op of test_torch_dispatch.py's samples on CUDA tensors: the CPU's results and gradients."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

_spec = importlib.util.spec_from_file_location(
    "dispatch_samples", Path(__file__).parent.parent / "test_torch_dispatch.py"
)
dispatch = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = dispatch
_spec.loader.exec_module(dispatch)

SAMPLES = [(name, i) for name in dispatch.NAMES for i in range(len(dispatch.samples(name)))]
#: Ops that CUDA refuses, with what the error must say.
REFUSED: dict[str, str] = {}
#: Options of ops that stay on the CPU although the tensors are on the GPU: packed bits of a filter.
ON_CPU = {("knn", 4), ("range_search", 2), ("knn_screened", 7), ("binary", 2)}


def moved(name, args):
    """The arguments on the GPU, as leaves of their own."""
    out = []
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and (name, i) not in ON_CPU:
            a = a.detach().cuda().requires_grad_(a.requires_grad)
        out.append(a)
    return out


def tensors(out):
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)]


@pytest.mark.sanitize
@pytest.mark.parametrize(("name", "which"), SAMPLES)
def test_gives_what_the_cpu_gives(gpu_torch, name, which):
    args = dispatch.samples(name)[which]
    op = getattr(dispatch.ops, name)
    here = moved(name, args)
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            op(*here)
        return
    want, got = tensors(op(*args)), tensors(op(*here))
    assert len(want) == len(got)
    for a, b in zip(want, got):
        assert b.is_cuda and b.dtype == a.dtype and b.shape == a.shape
        torch.testing.assert_close(b.cpu(), a, rtol=2e-5, atol=2e-5)
    if name not in dispatch.DIFFERENTIABLE:
        return
    which_out = dispatch.DIFFERENTIABLE[name]
    leaves = [(a, b) for a, b in zip(args, here) if isinstance(a, torch.Tensor) and a.requires_grad]
    if not leaves:
        return
    g = torch.randn_like(want[which_out])
    wanted = torch.autograd.grad(want[which_out], [a for a, _ in leaves], g)
    given = torch.autograd.grad(got[which_out], [b for _, b in leaves], g.cuda())
    for a, b in zip(wanted, given):
        torch.testing.assert_close(b.to_dense().cpu(), a.to_dense(), rtol=2e-5, atol=2e-5)
