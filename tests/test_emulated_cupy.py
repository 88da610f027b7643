"""What stands for CuPy in the emulator refuses what CuPy 13.6 refuses."""

from __future__ import annotations

import sys

import numpy as np
import pytest

if sys.platform == "win32":
    pytest.skip("the emulator is for POSIX", allow_module_level=True)
from emulated_cupy import cupy

A = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda a: np.asarray(a),
        lambda a: a + A,
        lambda a: A + a,
        lambda a: a @ A.T,
        lambda a: np.add(a, A),
        lambda a: cupy.add(a, [1, 2, 3, 4]),
        lambda a: cupy.sqrt(A),
        lambda a: cupy.concatenate([a, A]),
        lambda a: cupy.where(A > 1, 1, 0),
        lambda a: cupy.ascontiguousarray(A),
        lambda a: cupy.argsort(a, stable=True),
        lambda a: cupy.lexsort((a[0], a[1])),
        lambda a: a.max(initial=3),
        lambda a: a.sum(where=a > 1),
        lambda a: a.argsort(kind="stable"),
        lambda a: a.astype(int, casting="no"),
        lambda a: range(a.argmax()),
        lambda a: a[: a[0, 1]],
        lambda a: hash(a),
        lambda a: cupy.from_dlpack(A),
    ],
)
def test_type_errors(call):
    with pytest.raises(TypeError):
        call(cupy.asarray(A))


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (AttributeError, lambda a: cupy.put_along_axis),
        (NotImplementedError, lambda a: cupy.searchsorted(a[0], 3)),
        (ValueError, lambda a: a.__setitem__(slice(None), A)),
        (ValueError, lambda a: cupy.sort(a, kind="quicksort")),
        (ValueError, lambda a: cupy.repeat(a, cupy.arange(3))),
        (ValueError, lambda a: cupy.bincount(cupy.arange(0), minlength=3)),
        (ValueError, lambda a: cupy.empty(3, "U1")),
        (NotImplementedError, lambda a: a.T.sort()),
    ],
)
def test_other_errors(error, call):
    with pytest.raises(error):
        call(cupy.asarray(A))


def test_arrays_stay_on_the_device_and_views_are_views():
    a = cupy.asarray(A)
    for b in (a.sum(), a[0, 0], a > 1, 2 * a, np.float32(2) * a, np.sqrt(a), a.argmax()):
        assert type(b) is cupy.ndarray
    assert (2 * a).dtype == np.float32 and a.data.ptr % 512 == 0 and a[:0].data.ptr == 0
    a.T[1:][0, 0] = 7
    b = cupy.from_dlpack(a)
    b[a > 8] = -1
    want = A.copy()
    want[0, 1], want[want > 8] = 7, -1
    np.testing.assert_array_equal(a.get(), want)
    assert b.data.ptr == a.data.ptr and not a.T.astype(float).flags.c_contiguous
