"""How the package loads: environment variables, lazy imports, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import lutra
from lutra import _backend

compiled = pytest.mark.skipif(_backend.core is None, reason=f"no CPU module: {_backend.core_error}")


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter, with some environment variables more."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LUTRA_", "OMP_"))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def printed(program: str, **environment: str) -> str:
    run = python(program, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def failure(program: str, **environment: str) -> str:
    run = python(program, **environment)
    assert run.returncode == 1, f"exit code {run.returncode}: {run.stdout} {run.stderr}"
    return run.stderr.strip().splitlines()[-1]


def test_import_loads_neither_torch_nor_cupy():
    loaded = printed("import sys, lutra; print([m for m in ('torch', 'cupy', 'faiss') if m in sys.modules])")
    assert loaded == "[]"


def test_numpy_calls_do_not_load_torch():
    loaded = printed("""
        import sys, numpy as np, lutra
        lutra.address.sign_hash(np.ones((2, 8), np.float32))
        lutra.scan.knn(np.ones((2, 8), np.float32), np.ones((3, 8), np.float32), 2)
        print("torch" in sys.modules)
    """)
    assert loaded == "False"


def test_public_names():
    for name in lutra.__all__:
        if name == "nn":
            pytest.importorskip("torch")
        assert getattr(lutra, name) is not None
    assert set(lutra.__all__) <= set(dir(lutra))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lutra.nothing  # noqa: B018


# ---- LUTRA_BACKEND
def test_reference_backend_computes_the_same():
    program = """
        import numpy as np, lutra
        x = np.random.default_rng(0).standard_normal((5, 24), dtype=np.float32)
        print(lutra.simd_level(), lutra.address.sign_hash(x).codes.tolist())
    """
    level, codes = printed(program, LUTRA_BACKEND="reference").split(" ", 1)
    assert level == "none"
    assert printed(program).split(" ", 1)[1] == codes


@pytest.mark.parametrize("value", ["auto", "", " AUTO "])
def test_backend_auto(value):
    program = "import lutra; print(lutra.simd_level())"
    assert printed(program, LUTRA_BACKEND=value) == printed(program)


@compiled
def test_backend_cpu():
    assert printed("import lutra; print(lutra.simd_level())", LUTRA_BACKEND="cpu") != "none"


def test_backend_unknown():
    assert failure("import lutra", LUTRA_BACKEND="gpu") == (
        "ImportError: LUTRA_BACKEND is 'gpu'; it must be 'auto', 'cpu' or 'reference'"
    )


def test_backend_cpu_needs_the_module():
    program = """
        import sys
        sys.modules["lutra._core"] = None  # as if it could not be loaded
        import lutra
    """
    assert "LUTRA_BACKEND=cpu, but the CPU module cannot be used" in failure(program, LUTRA_BACKEND="cpu")


def test_without_the_module_the_reference_runs():
    program = """
        import sys
        sys.modules["lutra._core"] = None
        import lutra
        print(lutra.simd_level(), lutra.get_num_threads(), lutra._backend.core_error is not None)
    """
    assert printed(program) == "none 1 True"


# ---- LUTRA_SIMD
@compiled
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_simd_level(level):
    levels = ["portable", "avx2", "avx512"]
    program = "import lutra; print(lutra.simd_level())"
    best = _backend.core.best_simd_level()
    if levels.index(level) <= levels.index(best):
        assert printed(program, LUTRA_SIMD=level) == level
    else:
        assert f"not available: this machine's highest is '{best}'" in failure(program, LUTRA_SIMD=level)


@compiled
@pytest.mark.parametrize("value", ["avx1024", "AVX2", "0"])
def test_simd_level_unknown(value):
    message = failure("import lutra", LUTRA_SIMD=value)
    assert f"'{value}'" in message and "portable, avx2 or avx512" in message
    assert message.startswith("ImportError: LUTRA_SIMD")


@compiled
def test_simd_level_empty_is_the_best():
    assert (
        printed("import lutra; print(lutra.simd_level())", LUTRA_SIMD="") == _backend.core.best_simd_level()
    )


@compiled
def test_set_simd_level_names_what_it_got():
    with pytest.raises(ValueError, match=r"'fast'.*portable, avx2 or avx512"):
        _backend.core.set_simd_level("fast")


# ---- threads
@compiled
@pytest.mark.parametrize("value", ["1", "3", " 2 "])
def test_num_threads(value):
    assert printed("import lutra; print(lutra.get_num_threads())", LUTRA_NUM_THREADS=value) == value.strip()


@compiled
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_num_threads_wrong(value):
    assert failure("import lutra", LUTRA_NUM_THREADS=value) == (
        f"ImportError: LUTRA_NUM_THREADS is {value!r}; it must be a positive integer"
    )


@compiled
def test_num_threads_follows_openmp():
    assert printed("import lutra; print(lutra.get_num_threads())", OMP_NUM_THREADS="5") == "5"


@compiled
def test_num_threads_follows_torch():
    pytest.importorskip("torch")
    program = "import torch, lutra; torch.set_num_threads(7); print(lutra.get_num_threads())"
    assert printed(program) == "7"


@compiled
def test_set_num_threads_and_back():
    before = lutra.get_num_threads()
    lutra.set_num_threads(before + 1)
    try:
        assert lutra.get_num_threads() == before + 1
    finally:
        lutra.set_num_threads(0)
    assert lutra.get_num_threads() == before


@pytest.mark.parametrize("n", [-1, 1.0, "2", True, None])
def test_set_num_threads_wrong(n):
    with pytest.raises((TypeError, ValueError), match="n must be an integer"):
        lutra.set_num_threads(n)


@compiled
def test_forked_child_does_not_hang():
    program = """
        import os, numpy as np, lutra
        x = np.random.default_rng(0).standard_normal((20000, 64), dtype=np.float32)
        lutra.set_num_threads(2)
        want = lutra.address.sign_hash(x).codes  # starts the threads
        child = os.fork()
        if child == 0:
            same = (lutra.address.sign_hash(x).codes == want).all()
            os._exit(0 if same else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert printed(program) == "0"


# ---- arrays
def test_read_only_input_is_not_copied():
    x = np.random.default_rng(0).standard_normal((3, 8), dtype=np.float32)
    want = lutra.address.sign_hash(x).codes
    x.flags.writeable = False
    from lutra._arrays import NUMPY

    assert NUMPY.dense(x) is x
    np.testing.assert_array_equal(lutra.address.sign_hash(x).codes, want)
