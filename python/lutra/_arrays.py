"""NumPy, CuPy and torch arrays in; the same kind out.

An op looks up the ``Kind`` of its first array once. The kind knows the library's way to allocate, the dtype
codes, how a kernel gets at the memory, and which compiled module serves the device. Other arrays are
converted with DLPack on the way in and back by their own library on the way out.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _backend

# Codes of csrc/common/types.h. float64 has no kernel: such calls are computed by the reference.
CODES = {
    "float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "uint8": 4, "int32": 5, "int64": 6, "float64": -1,
}  # fmt: skip
F32, F16, BF16, I8, U8, I32, I64, F64 = 0, 1, 2, 3, 4, 5, 6, -1
NAMES = {code: name for name, code in CODES.items()}
FLOATS = (F32, F16, BF16)


class Held(int):
    """The address of a kernel's scratch memory, which lives as long as this number.

    The memory's library hands it out again, or gives it back to the driver, once nobody holds it. That must
    not happen before the kernel is launched, and a call holds its arguments until it returns.
    """

    owner: Any

    @classmethod
    def of(cls, address: int, owner: Any) -> Held:
        held = cls(address)
        held.owner = owner
        return held


class Kind:
    """What an op needs to know about an array library on one device."""

    name: str
    kernels: Any = None  # lutra._core, lutra._cuda or None (the reference)
    why_not: str | None = None
    cuda = False

    def code(self, a: Any) -> int | None:
        """The dtype code of ``a``; None where lutra knows no such dtype."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], code: int, like: Any) -> Any:
        """An uninitialised array of this kind on the device of ``like``."""
        raise NotImplementedError

    def dense(self, a: Any) -> Any:
        """``a`` itself where it is C-contiguous (and native-endian), else a copy that is."""
        raise NotImplementedError

    def copy(self, a: Any) -> Any:
        """A copy in memory of its own."""
        return a.clone() if self.name == "torch" else a.copy()

    def ptr(self, a: Any) -> Any:
        """What a binding takes for ``a``: the array or its address."""
        raise NotImplementedError

    def launch(self, a: Any, scratch: Any = None) -> tuple[int, ...]:
        """Trailing arguments of a kernel: () on the CPU; on CUDA its scratch memory, device and stream."""
        return ()

    def scratch(self, name: str, like: Any, *sizes: int) -> Any:
        """The scratch memory of a CUDA kernel, which allocates none itself; None on the CPU.

        `launch` makes of it the address that the kernel is called with, which keeps it alive until then.
        """
        if not self.cuda:
            return None
        wanted = getattr(self.kernels, f"{name}_workspace")(*sizes, *self.launch(like))
        return self.empty((wanted,), U8, like)

    def to_numpy(self, a: Any) -> np.ndarray:
        """A NumPy array for the reference (bfloat16 becomes float32)."""
        raise NotImplementedError

    def from_numpy(self, a: np.ndarray, code: int, like: Any) -> Any:
        """A result of the reference as an array of this kind with dtype ``code``."""
        raise NotImplementedError

    def cast(self, a: Any, code: int) -> Any:
        """``a`` with another dtype."""
        raise NotImplementedError


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


class NumpyKind(Kind):
    name = "numpy"

    def __init__(self) -> None:
        self.kernels = _backend.core
        self.why_not = _backend.core_error
        self._codes: dict[Any, int | None] = {np.dtype(n): c for n, c in CODES.items() if n != "bfloat16"}
        self._dtypes = {c: np.dtype(n) for n, c in CODES.items() if n != "bfloat16"}
        self._empty = np.empty

    def code(self, a):
        dtype = a.dtype
        try:
            return self._codes[dtype]  # big-endian and other unusual dtypes are added below
        except KeyError:
            native = dtype.newbyteorder("=")
            code = BF16 if dtype.name == "bfloat16" else self._codes.get(native)
            self._codes[dtype] = code
            return code

    def dtype(self, code):
        return self._dtypes[code] if code != BF16 else _bfloat16()

    def empty(self, shape, code, like=None):
        return self._empty(shape, self._dtypes[code] if code != BF16 else _bfloat16())

    def dense(self, a):
        # ascontiguousarray turns 0-d into 1-d; no op takes 0-d arrays this far.
        flags = a.flags
        if (
            flags.carray or (flags.c_contiguous and flags.aligned)
        ) and a.dtype.isnative:  # carray: writeable too
            return a
        return np.require(a.astype(a.dtype.newbyteorder("="), copy=False), requirements=["C", "A"])

    def ptr(self, a):
        return a

    def to_numpy(self, a):
        return a.astype(np.float32) if a.dtype.name == "bfloat16" else a

    def from_numpy(self, a, code, like=None):
        return a.astype(self.dtype(code), copy=False)

    def cast(self, a, code):
        return a.astype(self.dtype(code), copy=False)


class TorchKind(Kind):
    name = "torch"

    def __init__(self, cuda: bool) -> None:
        import torch

        self.torch = torch
        self.cuda = cuda
        self.kernels = _backend.cuda if cuda else _backend.core
        self.why_not = _backend.cuda_error if cuda else _backend.core_error
        self._codes = {getattr(torch, n): c for n, c in CODES.items()}
        self._dtypes = {c: getattr(torch, n) for n, c in CODES.items()}
        self._empty = torch.empty

    def code(self, a):
        return self._codes.get(a.dtype)

    def empty(self, shape, code, like):
        # Sizes one by one: torch parses a tuple 0.5 microseconds slower.
        return self._empty(*shape, dtype=self._dtypes[code], device=like.device)

    def dense(self, a):
        try:
            return a if a.is_contiguous() else a.contiguous()
        except RuntimeError:
            if a.layout is self.torch.strided:
                raise
            raise self._not_strided(a) from None

    def _not_strided(self, a):
        return TypeError(f"got a tensor of layout {a.layout}; lutra needs strided ones")

    def ptr(self, a):
        return a.data_ptr()

    def launch(self, a, scratch=None):
        if not self.cuda:
            return ()
        index = a.device.index
        where = index, self.torch.cuda.current_stream(index).cuda_stream
        return where if scratch is None else (Held.of(scratch.data_ptr(), scratch), *where)

    def to_numpy(self, a):
        if a.layout is not self.torch.strided:
            raise self._not_strided(a)
        a = a.detach()
        return (a.float() if a.dtype is self.torch.bfloat16 else a).cpu().numpy()

    def from_numpy(self, a, code, like):
        return self.torch.from_numpy(np.ascontiguousarray(a)).to(device=like.device, dtype=self._dtypes[code])

    def cast(self, a, code):
        return a.to(self._dtypes[code])


class CupyKind(Kind):
    name = "cupy"
    cuda = True

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.kernels = _backend.cuda
        self.why_not = _backend.cuda_error
        self._codes = {np.dtype(n): c for n, c in CODES.items() if n != "bfloat16"}
        self._dtypes = {c: np.dtype(n) for n, c in CODES.items() if n != "bfloat16"}

    def code(self, a):
        return self._codes.get(a.dtype)

    def empty(self, shape, code, like):
        with like.device:
            return self.cupy.empty(shape, self._dtypes[code])

    def dense(self, a):
        with a.device:
            return self.cupy.ascontiguousarray(a)

    def ptr(self, a):
        return a.data.ptr

    def launch(self, a, scratch=None):
        where = a.device.id, self.cupy.cuda.get_current_stream(a.device.id).ptr
        return where if scratch is None else (Held.of(scratch.data.ptr, scratch), *where)

    def to_numpy(self, a):
        return self.cupy.asnumpy(a)

    def from_numpy(self, a, code, like):
        with like.device:
            return self.cupy.asarray(a.astype(self._dtypes[code], copy=False))

    def cast(self, a, code):
        return a.astype(self._dtypes[code], copy=False)


def to_cupy(a: Any, device: Any) -> Any:
    """An array on a GPU, of torch or CuPy, as a CuPy array on a device.

    CuPy copies between devices on the current stream of the one that it copies to. That waits for the stream
    that wrote the array, and that stream for the copy: what is freed then may be written again at once.
    """
    import cupy

    torch = None
    if is_torch(a):
        a = a.detach()
        torch = a.float() if kind_of(a, "array").code(a) == BF16 else a
        a = cupy.from_dlpack(torch.contiguous())
    if a.device == device:
        with device:
            return cupy.asarray(a)
    with a.device:
        dense = cupy.ascontiguousarray(a)
        written = cupy.cuda.Event(disable_timing=True)
        written.record()
    with device:
        stream = cupy.cuda.get_current_stream()
        stream.wait_event(written)
        copy = cupy.asarray(dense)
        read = cupy.cuda.Event(disable_timing=True)
        read.record()
        if torch is not None:  # whose own stream does not know of the copy
            stream.synchronize()
    with a.device:
        cupy.cuda.get_current_stream().wait_event(read)
    return copy


NUMPY = NumpyKind()
_lazy: dict[str, Kind] = {}
_torch_types: set[type] = set()


def torch_kind(cuda: bool) -> Kind:
    key = "torch.cuda" if cuda else "torch"
    kind = _lazy.get(key)
    if kind is None:
        kind = _lazy[key] = TorchKind(cuda)
    return kind


def is_torch(a: Any) -> bool:
    """Whether ``a`` is a torch tensor, without importing torch."""
    if type(a) in _torch_types:
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(a, torch.Tensor):
        if not torch.compiler.is_compiling():
            _torch_types.add(type(a))
        return True
    return False


def _is_cupy(a: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(a, cupy.ndarray)


def kind_of(a: Any, name: str) -> Kind:
    """The kind of an array argument; a TypeError that names the argument where it is none.

    Arrays of other libraries are adopted by ``call`` before an op sees them.
    """
    if isinstance(a, np.ndarray):
        return NUMPY
    if is_torch(a):
        device = a.device.type
        if device in ("cpu", "cuda"):
            return torch_kind(device == "cuda")
        raise TypeError(
            f"{name} is a torch tensor on device {str(a.device)!r}; lutra computes on 'cpu' and 'cuda'"
        )
    if _is_cupy(a):
        kind = _lazy.get("cupy")
        if kind is None:
            kind = _lazy["cupy"] = CupyKind()
        return kind
    raise TypeError(
        f"{name} must be a NumPy, torch or CuPy array (or another array with __dlpack__), got {type_name(a)}"
        + ("; numpy.asarray makes one" if isinstance(a, (list, tuple)) else "")
    )


def quick(name: str) -> Any:
    """The quick call of an op (csrc/bind/core/quick.h), or a function that gives None where there is none.

    An op tries it first, on what ``type(a) is ndarray or eager(a)`` lets through; None sends it to ``call``.
    """
    return getattr(_backend.core, f"quick_{name}", None) or (lambda *_: None)


_eager_types: tuple[type, ...] = ()
_is_compiling: Any = None


def eager(a: Any) -> bool:
    """Whether ``a`` is an ordinary torch tensor and torch.compile is not tracing."""
    return type(a) in _eager_types and not _is_compiling()


def use_torch(torch: Any, forward_ad: Any) -> None:
    """Let quick calls read torch tensors; called once, when `lutra.torch_ops` is imported."""
    global _eager_types, _is_compiling
    if _backend.core is not None and _backend.core.use_torch(torch, forward_ad):
        _eager_types, _is_compiling = (torch.Tensor, torch.nn.Parameter), torch.compiler.is_compiling


def type_name(a: Any) -> str:
    t = type(a)
    return t.__qualname__ if t.__module__ == "builtins" else f"{t.__module__}.{t.__qualname__}"


def where(kind: Kind, a: Any) -> str:
    return {"numpy": "NumPy array", "cupy": "CuPy array"}.get(kind.name) or f"torch tensor on {a.device}"


def is_native(a: Any) -> bool:
    """Whether ``a`` is an array that the kernels read as it is."""
    return isinstance(a, np.ndarray) or is_torch(a) or _is_cupy(a)


def _foreign(a: Any) -> bool:
    return hasattr(a, "__dlpack__") and not is_native(a)


_torch_ops: Any = None


def _import_torch_ops() -> Any:
    global _torch_ops
    from . import torch_ops

    if not torch_ops.torch.compiler.is_compiling():
        _torch_ops = torch_ops
    return torch_ops


def call(name: str, implementation: Any, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Call an op on the arrays of one library and give back the same kind.

    ``arrays`` are the array arguments (None where an optional one is absent; the first is never None), whose
    names are ``implementation``'s parameters after ``kind``; ``options`` are the rest, in order. Torch
    tensors that need nothing from torch's dispatcher go straight to the kernel; the others through
    ``torch.ops.lutra.<name>``, where autograd, torch.compile and FakeTensor see the op.
    """
    first = arrays[0]
    if is_torch(first):
        torch_ops = _torch_ops or _import_torch_ops()
        if torch_ops.plain(*arrays):
            return implementation(torch_kind(first.is_cuda), *arrays, *options)
        names = implementation.__code__.co_varnames[1 : 1 + len(arrays)]
        for array, argument in zip(arrays, names):
            if array is not None and not is_torch(array):
                raise TypeError(
                    f"{argument} must be a torch tensor, as {names[0]} is; got {type_name(array)}"
                )
        return getattr(torch_ops.ops, name)(*arrays, *options)
    if any(_foreign(a) for a in arrays):
        like = next(a for a in arrays if _foreign(a))
        return _hand_back(call(name, implementation, tuple(_adopt(a) for a in arrays), options), like)
    names = implementation.__code__.co_varnames[1 : 1 + len(arrays)]
    kind = kind_of(first, names[0])
    for array, argument in zip(arrays, names):
        if array is not None and kind_of(array, argument) is not kind:
            got = where(kind_of(array, argument), array)
            raise TypeError(
                f"{argument} is a {got}, {names[0]} is a {where(kind, first)}; "
                "all arrays of a call must be of one library and on one device"
            )
    return implementation(kind, *arrays, *options)


def _adopt(a: Any) -> Any:
    """An array of another library as a NumPy (or, on a GPU, CuPy or torch) view; other values unchanged."""
    if not _foreign(a):
        return a
    device = int(a.__dlpack_device__()[0])
    if device in (1, 3):  # kDLCPU, kDLCUDAHost
        return np.from_dlpack(a)
    for library in ("cupy", "torch"):
        if library in sys.modules:
            return sys.modules[library].from_dlpack(a)
    raise TypeError(
        f"an array of type {type_name(a)} lies on a GPU: import torch or cupy, lutra needs one of them"
    )


def _hand_back(result: Any, like: Any) -> Any:
    """The result (an array or a tuple of them) in the library of ``like``."""
    if isinstance(result, tuple):
        return tuple(_hand_back(r, like) for r in result)
    if not is_native(result):
        return result
    space = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    space = space or sys.modules.get(type(like).__module__.split(".")[0])
    convert = getattr(space, "from_dlpack", None)
    return result if convert is None else convert(result)
