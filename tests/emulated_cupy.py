"""What stands for CuPy where its device is emulated: NumPy arrays in a wrapper as strict as CuPy 13.6.

What is named here exists in CuPy 13.6 with these arguments, by its source; the rest is an AttributeError, for
what CuPy lacks to be seen: look a name or an argument up there before it is added. An array is no NumPy
array, never becomes one by itself and does not mix with one; reductions give 0-d arrays, which are no
indices. Differences: Python's numbers take the type of the array beside them, as in CuPy 14 (13.6 looks at
their values), and indices out of range are errors (CuPy wraps them). There is one device and one stream.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

_libc, _pointer = ctypes.CDLL(None), ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_NUMBERS = (bool, int, float, complex, np.generic)
_BINARY = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "lshift": "left_shift", "rshift": "right_shift", "and": "bitwise_and",
    "or": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip
_COMPARED = {
    "lt": "less", "le": "less_equal", "eq": "equal", "ne": "not_equal", "gt": "greater",
    "ge": "greater_equal",
}  # fmt: skip
_UFUNCS = """abs absolute ceil cos exp floor invert isfinite isinf isnan log log2 logical_and logical_not
    logical_or maximum minimum negative rint sign sin sqrt square tanh true_divide"""
#: Arguments in their order, those behind a star by name alone; ``tup`` is a sequence of arrays.
_METHODS = {
    "all any max min": "a axis out keepdims", "argmax argmin": "a axis * out keepdims",
    "sum mean prod": "a axis dtype out keepdims", "cumsum": "a axis dtype out",
    "copy flatten ravel": "a order", "squeeze": "a axis", "clip": "a min max out",
    "round": "a decimals out", "nonzero": "a",
    "diagonal": "a offset axis1 axis2", "swapaxes": "a axis1 axis2", "take": "a indices axis out",
}  # fmt: skip
_FUNCTIONS = {
    "all any amax amin max min": "a axis out keepdims", "argmax argmin": "a axis * out keepdims",
    "sum mean prod": "a axis dtype out keepdims", "cumsum": "a axis dtype out", "clip": "a a_min a_max out",
    "round around": "a decimals out", "broadcast_to": "array shape", "nonzero flatnonzero": "a",
    "concatenate stack": "tup axis out * dtype casting", "dot": "a b out", "matmul": "x1 x2 out",
    "expand_dims squeeze flip": "a axis", "isin": "element test_elements assume_unique invert",
    "moveaxis": "a source destination", "swapaxes": "a axis1 axis2", "transpose": "a axes",
    "ravel": "a order", "take": "a indices axis out", "take_along_axis": "a indices axis",
    "roll": "a shift axis", "unique": "ar return_index return_inverse return_counts axis * equal_nan",
    "empty_like zeros_like ones_like": "a dtype order subok shape",
    "full_like": "a fill_value dtype order subok shape",
}  # fmt: skip
_MADE = {
    "zeros ones": "shape dtype order",
    "full": "shape fill_value dtype order",
    "arange": "start stop step dtype",
}
_SAME = """bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 dtype iinfo finfo
    inf nan newaxis"""


class _Memory:
    """Device memory: aligned as CuPy's, of exactly so many bytes, for AddressSanitizer to see."""

    def __init__(self, nbytes):
        p = ctypes.c_void_p()
        if _libc.posix_memalign(ctypes.byref(p), ctypes.c_size_t(512), ctypes.c_size_t(nbytes or 1)):
            raise MemoryError(nbytes)
        ctypes.memset(p.value, 0x7F, nbytes)  # what nobody wrote is seen
        self.address, self.size = p.value, nbytes

    def __del__(self, free=_libc.free):
        free(ctypes.c_void_p(self.address))

    @property
    def __array_interface__(self):
        return {"data": (self.address, False), "shape": (self.size,), "typestr": "|u1", "version": 3}


def _dtype(dtype):
    dtype = np.dtype(dtype)
    if dtype.char not in "?bhilqBHILQefdFD":  # there is no bfloat16
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype.newbyteorder("=")


def _wrap(value):
    """Results of NumPy as arrays on the device."""
    if isinstance(value, tuple):
        return tuple(map(_wrap, value))
    value = np.asarray(value)
    if value.base is None:  # no view of what is on the device
        memory = np.asarray(_Memory(value.nbytes))
        fresh = np.ndarray(value.shape, _dtype(value.dtype), memory, strides=value.strides)
        fresh[...] = value
        value = fresh
    a = object.__new__(ndarray)
    a._a = value
    return a


def _unwrap(value):
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if type(value) in (tuple, list):
        return type(value)(map(_unwrap, value))
    return value._a if isinstance(value, ndarray) else value


def _need(*arrays):
    for a in arrays:
        if not isinstance(a, ndarray):
            raise TypeError(f"a cupy.ndarray is needed, got {type(a)}")
    return arrays[0] if arrays else None


def _call(function, args, kwargs, out=None):
    _need(*(() if out is None else (out,)))
    with np.errstate(all="ignore"):
        done = function(*map(_unwrap, args), **{k: _unwrap(v) for k, v in kwargs.items()})
    return _wrap(done) if out is None else out


def _delegated(function, names):
    """NumPy's function for the arguments that CuPy's has."""
    places, known = names.partition("*")[0].split(), set(names.split())

    def call(*args, **kwargs):
        if len(args) > len(places) or not known.issuperset(kwargs):
            raise TypeError(f"CuPy's {function.__name__} takes ({names}), got {len(args)} and {list(kwargs)}")
        if names not in _MADE.values():
            _need(*(args[0] if places[0] == "tup" else args[:1]))
        return _call(function, args, kwargs, kwargs.get("out"))

    return call


def _ufunc(name):
    function = getattr(np, name)

    def call(*args, out=None, dtype=None, casting="same_kind"):
        args, out = args[: function.nin], args[function.nin] if len(args) > function.nin else out
        for a in args:
            if not isinstance(a, (ndarray, *_NUMBERS)):
                raise TypeError(f"Unsupported type {type(a)}")
        return _call(function, args, {"out": out, "dtype": dtype, "casting": casting}, out)

    return call


class ndarray:  # CuPy's name
    __slots__ = ("__weakref__", "_a")
    __module__, __hash__ = "cupy", None
    dtype, ndim, size, nbytes, itemsize, strides, shape = (
        property(lambda self, name=name: getattr(self._a, name))
        for name in ("dtype", "ndim", "size", "nbytes", "itemsize", "strides", "shape")
    )
    device = property(lambda self: Device(0))
    flags = property(lambda self: SimpleNamespace(c_contiguous=self._a.flags.c_contiguous))
    data = property(lambda self: SimpleNamespace(ptr=self._a.ctypes.data if self.size else 0, device_id=0))
    T = property(lambda self: self.transpose())

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        self._a = _wrap(np.empty(shape, _dtype(dtype), order))._a
        ctypes.memset(self._a.ctypes.data, 0x7F, self.nbytes)

    @property
    def __cuda_array_interface__(self):
        return self._a.__array_interface__ | {"data": (self.data.ptr, False), "version": 3, "stream": 1}

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if dl_device not in (None, (2, 0)) or copy:
            raise BufferError("copies by DLPack are not emulated")
        return _on_device(self._a.__dlpack__(max_version=max_version), 2)

    def __dlpack_device__(self):
        return 2, 0

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        function = getattr(cupy, ufunc.__name__, None) if method == "__call__" else None
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
        return NotImplemented if function is None else function(*inputs, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        function = getattr(cupy, func.__name__, None) if func.__module__ == "numpy" else None
        return NotImplemented if function is None else function(*args, **kwargs)

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return self._a.copy(order)
        out[...] = self._a
        return out

    def __reduce__(self):
        return _wrap, (self.get(),)

    def __deepcopy__(self, memo):
        return self.copy()

    def __format__(self, spec):
        return format(self._a if self.ndim else self._a[()], spec)

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def _key(self, key):
        """An index of NumPy's whose result is an array even of one element, and whether it holds arrays."""
        key = key if isinstance(key, tuple) else (key,)
        if sum(isinstance(k, ndarray) and k.dtype == bool for k in key) > 1:
            raise ValueError("an index with more than one boolean array")
        arrays = any(isinstance(k, (ndarray, np.ndarray, list)) for k in key)
        key = tuple(k._a if isinstance(k, ndarray) else k for k in key)
        return key if any(k is Ellipsis for k in key) else (*key, Ellipsis), arrays

    def __getitem__(self, key):
        key, arrays = self._key(key)
        return _wrap(self._a[key].copy() if arrays else self._a[key])

    def __setitem__(self, key, value):
        key, arrays = self._key(key)
        if not arrays and not isinstance(value, (ndarray, *_NUMBERS)) and np.shape(value):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        with np.errstate(all="ignore"):
            self._a[key] = value._a if isinstance(value, ndarray) else value

    def fill(self, value):
        self[...] = value

    def sort(self, axis=-1):
        if not self.flags.c_contiguous:
            raise NotImplementedError("Sorting non-contiguous array is not supported.")
        if self.ndim > 1 and not self.shape[axis]:
            raise ZeroDivisionError("rows of no length")
        self._a.sort(axis, kind="stable")

    def argsort(self, axis=-1):
        return cupy.argsort(self, axis)

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        with np.errstate(all="ignore"):
            a = self._a.astype(_dtype(dtype), order, copy=copy)
        return self if a is self._a else _wrap(a)

    def view(self, dtype=None):
        return _wrap(self._a.view() if dtype is None else self._a.view(_dtype(dtype)))

    def reshape(self, *shape, order="C"):
        return _wrap(self._a.reshape(*shape, order=order))

    def transpose(self, *axes):
        return _wrap(self._a.transpose(*axes))

    def __matmul__(self, other):
        return cupy.matmul(self, other)


def _add_methods():
    for name, ufunc in (_BINARY | _COMPARED).items():
        f = _ufunc(ufunc)
        setattr(ndarray, f"__{name}__", lambda self, other, f=f: f(self, other))
        if name in _BINARY:
            setattr(ndarray, f"__r{name}__", lambda self, other, f=f: f(other, self))
            setattr(ndarray, f"__i{name}__", lambda self, other, f=f: f(self, other, out=self))
    for name, ufunc in {"neg": "negative", "abs": "absolute", "invert": "invert"}.items():
        f = _ufunc(ufunc)
        setattr(ndarray, f"__{name}__", lambda self, f=f: f(self))
    for names, arguments in _METHODS.items():
        for name in names.split():
            setattr(ndarray, name, _delegated(getattr(np.ndarray, name), arguments))
    for name in ["tolist", "item", "tobytes", "__len__", "__bool__", "__int__", "__float__", "__repr__"]:
        setattr(ndarray, name, lambda self, name=name: getattr(self._a, name)())


def _on_device(capsule, kind):
    """A DLPack capsule whose memory is said to be of another kind of device (1: the CPU, 2: CUDA)."""
    name, offset = (b"dltensor_versioned", 40) if "versioned" in repr(capsule) else (b"dltensor", 8)
    ctypes.c_int32.from_address(_pointer(capsule, name) + offset).value = kind
    return capsule


class Device:
    compute_capability = "90"

    def __init__(self, device=None):
        self.id = int(device or 0)

    def __enter__(self):
        if self.id:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __exit__(self, *_):
        return None

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    __hash__ = object.__hash__
    use, synchronize = __enter__, __exit__


class Event:
    """An event, and what a stream has too: there is one, and work is done when it is given."""

    done = True

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        pass

    def record(self, event=None):
        return event or self

    def synchronize(self):
        return None


class Stream(Event):
    ptr, device_id = 0, 0

    def __init__(self, null=False, non_blocking=False, ptds=False):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait_event(self, event):
        if not isinstance(event, Event):
            raise TypeError(f"an event of CuPy is needed, got {event}")


class ExternalStream(Stream):
    def __init__(self, ptr, device_id=-1):
        super().__init__()


def _functions():
    """What is more than NumPy's function with CuPy's arguments."""

    def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
        if isinstance(obj, ndarray):
            return obj.astype(dtype or obj.dtype, order or "K", copy=bool(copy))
        obj = np.asarray(_unwrap(obj) if isinstance(obj, (list, tuple)) else obj)
        return _wrap(np.array(obj, _dtype(dtype or obj.dtype), order=order or "K", ndmin=ndmin))

    def asarray(a, dtype=None, order=None, *, blocking=False):
        return array(a, dtype, False, order)

    def ascontiguousarray(a, dtype=None):
        return _need(a).astype(dtype or a.dtype, "C", copy=False)

    def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
        return a.get(stream, order, out) if isinstance(a, ndarray) else np.asarray(a, order=order)

    def from_dlpack(array, *, device=None, copy=None):
        if array.__dlpack_device__()[0] != 2:
            raise TypeError("CPU arrays cannot be directly imported to CuPy.")
        capsule = _on_device(array.__dlpack__(stream=1, max_version=(1, 0)), 1)
        owner = {"__dlpack__": lambda self, **_: capsule, "__dlpack_device__": lambda self: (1, 0)}
        return _wrap(np.from_dlpack(type("Owner", (), owner)()))

    def empty(shape, dtype=float, order="C"):
        return ndarray(shape, dtype, order=order)

    def searchsorted(a, v, side="left", sorter=None):
        if not isinstance(a, ndarray) or not isinstance(v, ndarray):
            raise NotImplementedError("Only int or ndarray are supported for a and v")
        return _call(np.searchsorted, (a, v, side, sorter), {})

    def where(condition, x=None, y=None):
        return (
            _need(condition).nonzero() if x is None and y is None else _call(np.where, (condition, x, y), {})
        )

    def argsort(a, axis=-1, kind="stable"):
        if kind not in (None, "stable"):
            raise ValueError("kind can only be None or 'stable'")
        return _call(np.argsort, (_need(a), axis, "stable"), {})

    def sort(a, axis=-1, kind="stable"):
        if kind not in (None, "stable"):
            raise ValueError("kind can only be None or 'stable'")
        a = _need(a).flatten() if axis is None else a.copy()
        a.sort(-1 if axis is None else axis)
        return a

    def lexsort(keys):
        if _need(keys).ndim > 2:
            raise NotImplementedError("Keys with the rank of three or more is not supported in lexsort")
        return _call(np.lexsort, (keys,), {})

    def bincount(x, weights=None, minlength=None):
        if not _need(x).size:  # CuPy 14 counts nothing in nothing
            raise ValueError("zero-size array to reduction operation cupy_max which has no identity")
        if x.dtype.kind == "f":
            raise TypeError("x must be int array")
        return _call(np.bincount, (x, weights, minlength or 0), {})

    def repeat(a, repeats, axis=None):
        if isinstance(repeats, ndarray):
            raise ValueError("cupy.ndarray cannot be specified as `repeats` argument.")
        return _call(np.repeat, (_need(a), repeats, axis), {})

    def einsum(subscripts, *operands, dtype=None, optimize=False):
        _need(*operands)
        return _call(np.einsum, (subscripts, *operands), {"dtype": dtype, "optimize": optimize})

    return locals()


def _module():
    _add_methods()
    made = {"ndarray": ndarray, "__version__": "13.6.0", "__spec__": ModuleSpec("cupy", None)}
    made |= {name: getattr(np, name) for name in _SAME.split()}
    made |= {name: _ufunc(name) for name in (*_UFUNCS.split(), *_BINARY.values(), *_COMPARED.values())}
    for names, arguments in (_FUNCTIONS | _MADE).items():
        made |= {name: _delegated(getattr(np, name), arguments) for name in names.split()}
    made |= _functions()
    module, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    vars(cuda).update(Device=Device, Event=Event, Stream=Stream, ExternalStream=ExternalStream)
    Stream.null = Stream(null=True)
    cuda.get_current_stream = lambda device_id=-1: Stream.null
    cuda.runtime = SimpleNamespace(getDevice=lambda: 0, getDeviceCount=lambda: 1)
    vars(module).update(made, cuda=cuda)
    return module


cupy = _module()


def start() -> None:
    """Put it in the place of CuPy."""
    sys.modules["cupy"], sys.modules["cupy.cuda"] = cupy, cupy.cuda
