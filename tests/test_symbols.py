"""No instruction of a SIMD level outside that level's functions.

A function that two levels share (an inline function of a header, an instantiation of std::vector) is compiled
by both, and the linker keeps one copy: perhaps the one with AVX-512 in it, which then kills the process on an
older machine (faiss#5296). Two guards, with binutils:

- the built module: VEX and EVEX instructions may appear only in functions whose names hold lutra::v3:: or
  lutra::v4::, and those of AVX-512 only in lutra::v4::;
- the objects of a build tree, where there is one: what a level's object gives to the linker is all inside its
  own namespace.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lutra import _backend

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not (shutil.which("nm") and shutil.which("objdump")),
    reason="reads x86-64 code with binutils",
)

BASE, AVX2, AVX512 = 0, 1, 2
LEVEL_NAMES = ("the baseline", "v3 (AVX2)", "v4 (AVX-512)")

# Mnemonics with a v that are no vector instructions, and general instructions that x86-64-v3 adds.
NOT_VECTOR = {
    "verr",
    "verw",
    "vmcall",
    "vmfunc",
    "vmlaunch",
    "vmresume",
    "vmxoff",
    "vmxon",
    "vmrun",
    "vmmcall",
}
BMI = {
    "andn", "bextr", "blsi", "blsmsk", "blsr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx",
}  # fmt: skip
EVEX = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]")


def needed(instruction: str) -> int:
    """The level that an instruction needs."""
    if EVEX.search(instruction):
        return AVX512
    mnemonic = instruction.split(None, 1)[0]
    vector = mnemonic.startswith("v") and mnemonic not in NOT_VECTOR
    return AVX2 if vector or mnemonic.rstrip("lq") in BMI else BASE


def allowed(function: str) -> int:
    """The level that a function's name grants; objdump leaves the longest names as they were mangled."""
    if "lutra::v4::" in function or function.startswith("_ZN5lutra2v4"):
        return AVX512
    return AVX2 if "lutra::v3::" in function or function.startswith("_ZN5lutra2v3") else BASE


def functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    """Names and instructions out of ``objdump --disassemble --demangle --no-show-raw-insn``."""
    name, body = "", []
    for line in disassembly.splitlines():
        if line.endswith(">:") and " <" in line:
            if body:
                yield name, body
            name, body = line.split(" <", 1)[1][:-2], []
        elif line.startswith(" ") and ":\t" in line:
            instruction = line.split(":\t", 1)[1].strip()
            if instruction and instruction != "(bad)":
                body.append(instruction)
    if body:
        yield name, body


def misplaced(disassembly: str) -> list[str]:
    """Functions with an instruction above their level, each with one of those."""
    out = []
    for name, body in functions(disassembly):
        grants = allowed(name)
        for instruction in body:
            if needed(instruction) > grants:
                out.append(f"{name} is of {LEVEL_NAMES[grants]} and holds: {instruction}")
                break
    return out


def run(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def disassemble(path: str | Path) -> str:
    return run("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path)


def leaking(path: Path, level: str) -> list[str]:
    """Global and weak symbols that an object defines outside lutra::<level>::."""
    out = []
    for line in run("nm", "--defined-only", "--extern-only", "--demangle", path).splitlines():
        kind, name = line.split(None, 2)[1:]
        if f"lutra::{level}::" not in name and not name.startswith("DW.ref."):
            out.append(f"{name} ({kind}) in {path.name}")
    return out


# ---- the built module
@pytest.fixture(scope="module")
def module_code() -> str:
    if _backend.core is None:
        pytest.skip(f"no CPU module: {_backend.core_error}")
    code = disassemble(_backend.core.__file__)
    if "lutra::portable::" not in code:
        pytest.skip("the module is stripped")
    return code


def test_module_keeps_levels_apart(module_code):
    assert misplaced(module_code) == []


def test_module_uses_its_levels(module_code):
    """Each level's functions do hold its instructions: the guard sees what it guards."""
    seen = Counter()
    for name, body in functions(module_code):
        seen[allowed(name), max(map(needed, body))] += 1
    assert seen[BASE, BASE] > 100
    assert seen[AVX2, AVX2] > 10
    assert seen[AVX512, AVX512] > 10


# ---- the objects of a build tree
def newest_objects() -> list[tuple[str, Path]]:
    """(level, object) of the most recent build of the CPU kernels under build/."""
    trees: dict[Path, list[tuple[str, Path]]] = {}
    for path in (Path(__file__).resolve().parents[1] / "build").glob("*/CMakeFiles/lutra_*.dir/**/*.o"):
        folder = next(p for p in path.parents if p.name.startswith("lutra_"))
        if folder.name.startswith("lutra_cuda"):  # these have no levels to keep apart
            continue
        trees.setdefault(folder.parent, []).append((folder.name[len("lutra_") : -len(".dir")], path))
    if not trees:
        return []
    return max(trees.values(), key=lambda objects: max(path.stat().st_mtime for _, path in objects))


def test_objects_define_nothing_outside_their_namespace():
    objects = newest_objects()
    if not objects:
        pytest.skip("no build tree here")
    assert [leak for level, path in objects for leak in leaking(path, level)] == []
    assert {"portable", "v3", "v4"} <= {level for level, _ in objects}


# ---- the guards can fail
ACCIDENT = """
#include <vector>
inline void scale(float* p, int n) { for (int i = 0; i < n; ++i) p[i] *= 3.0f; }  // shared by every level
namespace lutra { namespace v4 {
void fine(float* p, int n) { for (int i = 0; i < n; ++i) p[i] += 1.0f; }
void (*leak)(float*, int) = &scale;
void grow(std::vector<float>& v) { v.push_back(1.0f); }
} }
"""


@pytest.fixture(scope="module")
def accident(tmp_path_factory) -> Path:
    """An object with the accident in it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("accident")
    (folder / "accident.cc").write_text(ACCIDENT)
    flags = ["-O3", "-fPIC", "-march=x86-64-v4", "-mprefer-vector-width=512"]
    run(compiler, *flags, "-c", folder / "accident.cc", "-o", folder / "accident.o")
    return folder / "accident.o"


def test_guard_finds_a_shared_function_in_the_code(accident):
    found = misplaced(disassemble(accident))
    assert any(line.startswith("scale(float*, int)") for line in found)
    assert not any(line.startswith("lutra::v4::fine") for line in found)


def test_guard_finds_weak_symbols_in_the_object(accident):
    found = leaking(accident, "v4")
    assert any(line.startswith("scale(float*, int) (W)") for line in found)
    assert any("std::vector<float" in line for line in found)
    assert not any("fine" in line or "leak" in line for line in found)
    assert any("fine" in line for line in leaking(accident, "v3"))


@pytest.mark.parametrize(
    ("instruction", "level"),
    [
        ("movaps %xmm0,%xmm1", BASE),
        ("mulps  %xmm15,%xmm1", BASE),
        ("tzcnt  %eax,%eax", BASE),
        ("popcnt %rax,%rax", BASE),
        ("verw   (%rax)", BASE),
        ("vaddps %xmm0,%xmm1,%xmm2", AVX2),
        ("vfmadd231ps %ymm15,%ymm1,%ymm2", AVX2),
        ("shlx   %eax,%ecx,%edx", AVX2),
        ("andn   %rax,%rcx,%rdx", AVX2),
        ("vaddps %xmm16,%xmm1,%xmm2", AVX512),
        ("vaddps %ymm31,%ymm1,%ymm2", AVX512),
        ("vaddps %zmm0,%zmm1,%zmm2", AVX512),
        ("kmovw  %k1,%eax", AVX512),
        ("vmovups (%rax),%xmm0{%k1}{z}", AVX512),
    ],
)
def test_needed(instruction, level):
    assert needed(instruction) == level
