"""The CUDA tests on a machine without a GPU: LUTRA_EMULATE names the folder of the emulated modules.

``cmake --preset emulate && cmake --build --preset emulate`` builds them into build/emulate; what they are and
what can be varied (LUTRA_EMULATE_ORDER, _SMS, _CC, _DEVICES) is in csrc/emulate/machine.h. `start` gives the
CPU build of torch devices "cuda" whose memory is the host's, fits ``torch.cuda`` to them, and loads the
emulated kernels as ``lutra._cuda``. It must run before torch and lutra are imported. What stands for CuPy is
in emulated_cupy.py. Real streams and torch.compile's inductor are not there: such tests are skipped. A CUDA
graph runs again what its capture ran.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import os
import sys
import threading
from pathlib import Path


def folder() -> Path | None:
    """Where the emulated modules are; None where nothing is emulated."""
    text = os.environ.get("LUTRA_EMULATE", "").strip()
    return Path(__file__).resolve().parents[1] / text if text else None


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start() -> None:
    """Put the emulated device in the place of a GPU, for the rest of this process."""
    place = folder()
    found = list(place.glob("_cuda_emulated*.so"))
    device = place / "libtorch_emulated.so"
    if len(found) != 1 or not device.is_file():
        raise FileNotFoundError(f"no emulated modules in {place}: cmake --build --preset emulate makes them")
    if "torch" in sys.modules or "lutra" in sys.modules:
        raise RuntimeError("torch or lutra was imported before the emulation began")
    exchange = ctypes.CDLL(str(device), ctypes.RTLD_GLOBAL).lutra_emulated_device
    sys.modules["lutra._cuda"] = _load("_cuda_emulated", found[0])
    _fit_torch(exchange)
    import emulated_cupy

    emulated_cupy.start()


def _watch():
    """What stands for ``torch.cuda``'s sync debug mode: operators that would wait for a GPU are errors."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    reading = {
        aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive,
        aten.unique_dim, aten.bincount, aten.equal, aten.is_nonzero, aten.item,
    }  # fmt: skip

    def device_of(a):
        return a.device.type if isinstance(a, torch.Tensor) else None

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs, op = kwargs or {}, func.overloadpacket
            on_gpu = device_of(args[0]) == "cuda" if args else False
            waits = on_gpu and op in reading
            if op is aten._to_copy and not kwargs.get("non_blocking"):
                to = torch.device(kwargs.get("device") or args[0].device).type
                waits = (to == "cuda") != on_gpu
            elif op is aten.copy_ and not (len(args) > 2 and args[2]):
                waits = device_of(args[1]) != device_of(args[0]) and args[1].dim() > 0
            elif op in (aten.index, aten.index_put_) and on_gpu:
                waits = any(i is not None and i.dtype == torch.bool for i in args[1])
            elif op is aten.repeat_interleave and on_gpu:
                waits = kwargs.get("output_size") is None
            if waits:
                raise RuntimeError(f"called a synchronizing CUDA operation: {func}")
            return func(*args, **kwargs)

    now = {"mode": 0, "watch": None}

    def get():
        return now["mode"]

    def set_(mode):
        mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
        if now["watch"] is not None:
            now["watch"].__exit__(None, None, None)
            now["watch"] = None
        if mode == 2:
            now["watch"] = Waits()
            now["watch"].__enter__()
        now["mode"] = mode

    return get, set_


def _graphs(get_sync, set_sync):
    """What stands for CUDA graphs: a capture runs, and notes what it ran; a replay runs that again.

    As with a graph, arguments are those of the capture, results come to lie where they lay then, what Python
    decided is not decided again, and what would wait for a GPU is an error. What operators wrote to is put
    back when the capture ends (not what kernels wrote that were called with addresses).
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    inside = threading.local()  # how many operators a thread is in
    tapes: list[list] = []  # of the capture that runs

    def noted(function):
        @functools.wraps(function)
        def call(*args):
            out = function(*args)
            if tapes and not getattr(inside, "depth", 0):
                tapes[-1].append(lambda: function(*args))
            return out

        return call

    kernels = sys.modules["lutra._cuda"]
    for name in dir(kernels):
        function = getattr(kernels, name)
        if inspect.isbuiltin(function) and not name.endswith("_workspace"):
            setattr(kernels, name, noted(function))

    class Note(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.before: list[tuple] = []  # tensors that were written to, and what they held

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            inside.depth = getattr(inside, "depth", 0) + 1
            given = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
            for a in func._schema.arguments:
                if a.alias_info is not None and a.alias_info.is_write:
                    written = [t for t in tree_leaves(given.get(a.name)) if isinstance(t, torch.Tensor)]
                    self.before += [(t, t.clone()) for t in written]
            try:
                out = func(*args, **kwargs)
            finally:
                inside.depth -= 1

            def again():
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)

            if not func.is_view and "empty" not in str(func.overloadpacket):
                tapes[-1].append(again)
            else:
                tapes[-1].append(lambda kept=out: None)  # memory that the rest of the tape writes to
            return out

    class Graph:
        def __init__(self, *_, **__):
            self.tape = []

        def replay(self):
            with torch.no_grad():
                for step in self.tape:
                    step()

        def pool(self):
            return None

        reset = pool

    class Capture:
        def __init__(self, graph, *_, **__):
            self.graph = graph

        def __enter__(self):
            self.before = get_sync()
            self.graph.tape.clear()
            tapes.append(self.graph.tape)
            set_sync("error")
            self.note = Note()
            self.note.__enter__()

        def __exit__(self, *error):
            self.note.__exit__(*error)
            set_sync(self.before)
            tapes.pop()
            with torch.no_grad():
                for written, held in reversed(self.note.before):
                    written.copy_(held)

    def synchronize(*_):
        if tapes:
            raise RuntimeError("torch.cuda.synchronize() in a capture")

    return Graph, Capture, synchronize


def _fit_torch(exchange) -> None:
    """``exchange`` makes a device current, unless it is negative, and gives the one before."""
    import torch

    def number(device) -> int:
        if device is None or isinstance(device, int):
            return -1 if device is None else device
        index = torch.device(device).index
        return -1 if index is None else index

    @contextlib.contextmanager
    def on(device):
        before = exchange(number(device))
        try:
            yield
        finally:
            exchange(before)

    class Stream:
        """The one stream of a device: work is done when it is given."""

        cuda_stream = stream_id = ptr = 0

        def __init__(self, *_, device=None, **__):
            index = number(device)
            self.device = torch.device("cuda", exchange(-1) if index < 0 else index)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def nothing(self, *_, **__):
            return None

        wait_stream = wait_event = synchronize = record_event = record = nothing

        def __eq__(self, other):
            return isinstance(other, Stream) and self.device == other.device

        def __hash__(self):
            return hash(self.device)

        def query(self):
            import pytest

            pytest.skip("streams that work while the caller goes on are not emulated")

    def stream_of(device=None):
        return Stream(device=device)

    cuda = torch.cuda
    get_sync, set_sync = _watch()
    graph_type, capture, synchronize = _graphs(get_sync, set_sync)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: max(1, int(os.environ.get("LUTRA_EMULATE_DEVICES") or 1)),
        "current_device": lambda: exchange(-1),
        "set_device": lambda device: exchange(number(device)),
        "synchronize": synchronize,
        "current_stream": stream_of,
        "default_stream": stream_of,
        "stream": lambda s: s,
        "get_device_name": lambda *_: "emulated",
        "get_device_capability": lambda *_: (9, 0),
        "get_sync_debug_mode": get_sync,
        "set_sync_debug_mode": set_sync,
        "empty_cache": lambda: None,
        "_sleep": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),  # Dynamo keeps it
        "set_rng_state": lambda *_: None,
        "device": on,
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Stream,
        "CUDAGraph": graph_type,
        "graph": capture,
    }.items():
        setattr(cuda, name, value)
    torch._C._cuda_init = lambda: None
    torch._C._cuda_getDevice = lambda: exchange(-1)  # Dynamo asks

    clone = torch.UntypedStorage.clone

    def cloned(storage):  # a build without CUDA makes no storage of such a device
        if storage.device.type != "cuda":
            return clone(storage)
        one = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return one.set_(storage, 0, (storage.nbytes(),), (1,)).clone().untyped_storage()

    torch.UntypedStorage.clone = cloned
    sparse_coo_tensor = torch.sparse_coo_tensor

    def sparse(indices, values=None, *args, **kwargs):
        if torch.is_tensor(values) and values.is_cuda:
            import pytest

            pytest.skip("sparse tensors of the device are not emulated")
        return sparse_coo_tensor(indices, values, *args, **kwargs)

    torch.sparse_coo_tensor = sparse
