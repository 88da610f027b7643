"""``lutra info``: what is installed, what runs, and why something does not."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

from .. import _backend
from .._version import __version__

#: What lutra works with, by the names of their distributions (a GPU build has a name of its own).
LIBRARIES = {
    "numpy": ("numpy",),
    "safetensors": ("safetensors",),
    "torch": ("torch",),
    "cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x"),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss"),
}


def _version(names: tuple[str, ...]) -> str | None:
    """Version of the first of these that is installed, from its metadata: nothing is imported."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    cuda = _backend.cuda
    if cuda is None or not _backend.cuda_status()[0]:
        return []
    return [cuda.device_name(i) for i in range(cuda.device_count()[0])]


def collect() -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    core = _backend.core
    cuda_runs, cuda_note = _backend.cuda_status()
    return {
        "lutra": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backends": {
            "cpu": {"available": core is not None, "reason": _backend.core_error},
            "cuda": {"available": cuda_runs, "reason": None if cuda_runs else cuda_note},
            "reference": {"available": True, "reason": None},
        },
        "simd": {
            "level": _backend.simd_level(),
            "best": None if core is None else core.best_simd_level(),
        },
        "threads": _backend.get_num_threads(),
        "gpus": _gpus(),
        "libraries": {name: _version(names) for name, names in LIBRARIES.items()},
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith("LUTRA_") or k == "OMP_NUM_THREADS"
        },
    }


def show(as_json: bool = False) -> None:
    """Print the table, or JSON."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"lutra {facts['lutra']}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Python", f"{facts['python']} on {escape(facts['platform'])}")
    table.add_row("processor", f"{escape(facts['processor'])}, {facts['cores']} cores available")
    table.add_section()
    for name, backend in facts["backends"].items():
        reason = f"[yellow]no[/]: {escape(str(backend['reason']))}"
        table.add_row(f"backend {name}", "[green]yes[/]" if backend["available"] else reason)
    simd = facts["simd"]
    best = f" (this machine's best: {simd['best']})" if simd["best"] not in (None, simd["level"]) else ""
    table.add_row("SIMD level", f"{simd['level']}{best}")
    table.add_row("threads", str(facts["threads"]))
    for i, name in enumerate(facts["gpus"]):
        table.add_row(f"GPU {i}", escape(name))
    table.add_section()
    for name, version in facts["libraries"].items():
        table.add_row(name, escape(version) if version else "[dim]not installed[/]")
    if facts["environment"]:
        table.add_section()
        for name, value in facts["environment"].items():
            table.add_row(name, escape(value))
    Console().print(table)
