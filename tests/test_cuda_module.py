"""The CUDA module where there is no GPU: it imports, says so, and fails with messages instead of crashing."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from lutra import _arrays, _backend

if _backend.cuda is None:
    pytest.skip(f"the CUDA module cannot be used: {_backend.cuda_error}", allow_module_level=True)
cuda = _backend.cuda
COUNT, MESSAGE = cuda.device_count()
no_gpu = pytest.mark.skipif(COUNT > 0, reason="this machine has a GPU")


def test_device_count_and_message_agree():
    assert isinstance(COUNT, int) and isinstance(MESSAGE, str)
    assert (COUNT > 0) == (MESSAGE == "")
    usable, text = _backend.cuda_status()
    assert usable == (COUNT > 0) and text


@no_gpu
def test_status_tells_why():
    usable, text = _backend.cuda_status()
    assert not usable and "CUDA" in text


@no_gpu
@pytest.mark.parametrize(
    "call",
    [
        lambda: cuda.sign_hash(0, 0, 1, 1, 8, 0, 1.0, 0, 0, 0, 0),
        lambda: cuda.knn_workspace(1, 10, 4, 3, 0, 0, False, True, 0, 0),
        lambda: cuda.device_name(0),
    ],
)
def test_a_call_without_a_device_is_an_error(call):
    with pytest.raises(RuntimeError, match=r"lutra: .*(CUDA|driver|device)"):
        call()


def test_the_same_functions_as_the_cpu_module():
    core = pytest.importorskip("lutra._core")
    for name in (
        "sign_hash",
        "sign_hash_backward",
        "token_ngrams",
        "bag",
        "tables",
        "tables_backward",
        "knn",
        "pq",
    ):
        assert hasattr(core, name) and hasattr(cuda, name), name


def test_addresses_are_integers_or_none():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cuda.sign_hash(np.zeros(8), 0, 1, 1, 8, 0, 1.0, 0, 0, 0, 0)


def test_scratch_is_for_cuda_alone():
    assert _arrays.NUMPY.scratch("knn", np.zeros(1), 1, 2, 3, 4) is None
    assert _arrays.NUMPY.launch(np.zeros(1), None) == ()


def test_scratch_lives_as_long_as_its_address():
    """A call such as kernel(*kind.launch(a, kind.scratch(...))) holds nothing else of it."""

    class Memory:
        pass

    memory = Memory()
    alive = weakref.ref(memory)
    address = _arrays.Held.of(4096, memory)
    del memory
    assert alive() is not None and address == 4096
    with pytest.raises(RuntimeError, match=r"device|driver"):  # it is taken for an address
        cuda.sign_hash(address, 0, 1, 1, 8, 0, 1.0, address, address, 0, 0)
    del address
    assert alive() is None
