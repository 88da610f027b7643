"""The CUDA tests on a machine without a GPU: LUTRA_EMULATE names the folder of the emulated modules.

``cmake --preset emulate && cmake --build --preset emulate`` builds them into build/emulate; what they are
and what can be varied (LUTRA_EMULATE_ORDER, _SMS, _CC) is in csrc/emulate/machine.h. `start` gives the CPU
build of torch a device "cuda" whose memory is the host's, fits ``torch.cuda`` to it, and loads the emulated
kernels as ``lutra._cuda``. It must run before torch and lutra are imported. CuPy, CUDA graphs, real streams
and torch.compile's inductor are not there: such tests are skipped.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
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
    ctypes.CDLL(str(device), ctypes.RTLD_GLOBAL)
    sys.modules["lutra._cuda"] = _load("_cuda_emulated", found[0])
    _fit_torch()


def _fit_torch() -> None:
    import pytest
    import torch

    class Stream:
        """The one stream there is: work is done when it is given."""

        cuda_stream = stream_id = ptr = 0
        device = torch.device("cuda", 0)

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def nothing(self, *_, **__):
            return None

        wait_stream = wait_event = synchronize = record_event = nothing

        def query(self):
            return True

    class Graph:
        def __init__(self, *_, **__):
            pytest.skip("CUDA graphs are not emulated")

    cuda = torch.cuda
    one = Stream()
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: one,
        "default_stream": lambda *_: one,
        "stream": lambda s: s,
        "get_device_name": lambda *_: "emulated",
        "get_device_capability": lambda *_: (9, 0),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda *_: None,
        "empty_cache": lambda: None,
        "_sleep": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "device": lambda *_: contextlib.nullcontext(),
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Stream,
        "CUDAGraph": Graph,
    }.items():
        setattr(cuda, name, value)
    torch._C._cuda_init = lambda: None
