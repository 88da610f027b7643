"""The CUDA kernels are compiled for sm_80, sm_90 and sm_90a, and ptxas' report is read: no kernel spills.

A spill in a hot loop is traffic through local memory that nothing else would show on a machine without a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Kernels that may spill, by the longest spill in bytes, and why.
ALLOWED = {
    "weight_slab_kernelIfLi8E": (20, "before its loop, and once for 64 bytes of a token's columns"),
}
ARCHS = "80-real;90-real"  # .ci/run builds the same, so that its objects are of use
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


def kernels(log):
    """(mangled name, architecture) -> bytes of spill stores and loads, registers."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return {
        (m["name"], m["arch"]): (max(int(m["stores"]), int(m["loads"])), int(m["registers"]))
        for m in entry.finditer(log)
    }


def test_the_report_is_understood():
    log = """ptxas info    : Compiling entry function '_ZN5lutra1aEv' for 'sm_90'
ptxas info    : Function properties for _ZN5lutra1aEv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN5lutra1bEv' for 'sm_90a'
ptxas info    : Function properties for _ZN5lutra1bEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""
    assert kernels(log) == {("_ZN5lutra1aEv", "sm_90"): (12, 64), ("_ZN5lutra1bEv", "sm_90a"): (0, 18)}


def compiled(cmake, folder):
    """What ptxas says of every CUDA source."""
    launcher = ["-DCMAKE_CUDA_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    configure = [
        cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", "-DLUTRA_CUDA=ON",
        f"-DLUTRA_CUDA_ARCHS={ARCHS}", "-DLUTRA_PTXAS_REPORT=ON", f"-DCMAKE_CUDA_COMPILER={NVCC}",
        f"-DPython_EXECUTABLE={sys.executable}", *launcher,
    ]  # fmt: skip
    run = subprocess.run(configure, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    build = [cmake, "--build", str(folder), "--target", "lutra_cuda", "lutra_cuda_sm90", "--parallel", "2"]
    if not list((ROOT / "csrc").glob("*/*_sm90.cu")):
        build.remove("lutra_cuda_sm90")
    run = subprocess.run(build, capture_output=True, text=True)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-4000:]
    return log


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_no_kernel_spills():
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    pytest.importorskip("pybind11")
    # in the place that pip builds in, so that a ccache of that build's objects is of use
    folder = ROOT / "build" / f"registers-{os.getpid()}"
    try:
        log = compiled(cmake, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ours = {key: value for key, value in kernels(log).items() if key[0].startswith("_ZN5lutra")}
    for arch in ("sm_80", "sm_90"):
        assert sum(a == arch for _, a in ours) > 50, (
            f"ptxas' report for {arch} was not found in the build's output"
        )
    assert any(a == "sm_90a" for _, a in ours)
    spilling = []
    for (name, arch), (spilled, registers) in sorted(ours.items()):
        allowed = max((bytes_ for kernel, (bytes_, _) in ALLOWED.items() if kernel in name), default=0)
        if spilled > allowed:
            spilling.append(f"{name} for {arch}: {spilled} bytes, {registers} registers")
    assert not spilling, "\n".join(spilling)
