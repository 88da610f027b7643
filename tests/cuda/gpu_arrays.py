"""Arrays on the GPU for the tests: NumPy in and out, whatever the library."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 97)
FLOATS = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "uint8": 1e-4, "int8": 1e-4}
DEVICE = os.environ.get("LUTRA_TEST_DEVICE") or "cuda"  # cuda:1, say, while cuda:0 is the current one


class Torch:
    name = "torch"

    def __init__(self):
        self.torch = pytest.importorskip("torch")

    def put(self, a, dtype=None):
        """A NumPy array on the GPU, as ``dtype`` (which may be 'bfloat16')."""
        if a is None:
            return None
        t = self.torch.from_numpy(np.ascontiguousarray(a)).to(DEVICE)
        return t if dtype is None else t.to(getattr(self.torch, dtype))

    def get(self, a):
        """The NumPy array behind an array on the GPU; bfloat16 becomes float32."""
        a = a.detach()
        return (a.float() if a.dtype == self.torch.bfloat16 else a).cpu().numpy()

    def owns(self, a):
        return self.torch.is_tensor(a) and a.device.type == "cuda"

    @contextlib.contextmanager
    def no_sync(self):
        """Anything that makes torch wait for the device is an error."""
        before = self.torch.cuda.get_sync_debug_mode()
        self.torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.torch.cuda.set_sync_debug_mode(before)


class Cupy:
    name = "cupy"

    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    def put(self, a, dtype=None):
        if a is None:
            return None
        if dtype == "bfloat16":
            pytest.skip("CuPy has no bfloat16")
        return self.cupy.asarray(a if dtype is None else a.astype(dtype))

    def get(self, a):
        return self.cupy.asnumpy(a)

    def owns(self, a):
        return isinstance(a, self.cupy.ndarray)

    def no_sync(self):
        return contextlib.nullcontext()


def library(name):
    return {"torch": Torch, "cupy": Cupy}[name]()


def rounded(a, dtype):
    """``a`` with the precision of ``dtype``, as float32: what the reference should see."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)
    return a.astype(dtype).astype(np.float32)


def close(got, expected, dtype="float32", factor=1.0):
    limit = TOLERANCE[dtype] * factor
    finite = np.abs(expected)[np.isfinite(expected)] if np.size(expected) else expected
    np.testing.assert_allclose(
        got.astype(np.float64),
        expected.astype(np.float64),
        rtol=limit,
        atol=limit * max(1.0, finite.max(initial=0)),
    )


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()
