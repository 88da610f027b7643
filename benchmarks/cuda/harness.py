"""What the CUDA benchmarks share: a case, its timing with CUDA events, the limits, checks of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

GB = 1e9
INPUTS = 6  # sets of inputs that calls rotate through
#: Which of the measured limits a case's operations are counted against.
RATES = ("fp32", "tf32", "bf16", "int8")


@dataclass
class Case:
    """One line of the table.

    ``ours`` and ``theirs`` are called with one of ``inputs`` at a time; ``check`` compares what they return.
    ``bytes`` and ``flops`` are what a call has to move and to compute at least, ``rate`` the kind of product
    whose measured rate limits the latter. With ``flush`` the L2 cache is overwritten before each call (for
    data that would stay there from call to call, and would not in use); with ``graph`` both are captured in
    CUDA graphs and their replays timed. ``build`` makes large data only when the case is run: it returns
    ``(ours, inputs, theirs)``, which then replace those above.
    """

    name: str
    ours: Callable[..., Any] | None
    inputs: list[tuple[Any, ...]]
    theirs: Callable[..., Any] | None = None
    check: Callable[[Any, Any], None] | None = None
    bytes: float = 0
    flops: float = 0
    rate: str = "fp32"
    flush: bool = False
    graph: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], tuple[Any, ...]] | None = None
    peer: str = "torch"  # whose function `theirs` is


_trash: list[torch.Tensor] = []


def flush_l2() -> None:
    """Fill the L2 cache with other data: 256 MB are written, several times what any L2 holds."""
    if not _trash:
        _trash.append(torch.empty(64 << 20, device="cuda"))
    _trash[0].fill_(1.0)


def captured(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> Callable[..., Any]:
    """A function that replays the CUDA graph of a call: of one call for each set of inputs, in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in inputs:
            function(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = []
    for args in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*args)
        graphs.append((graph, out))
    turn = [0]

    def replay(*_: Any) -> Any:
        graph, out = graphs[turn[0] % len(graphs)]
        turn[0] += 1
        graph.replay()
        return out

    return replay


def milliseconds(
    functions: list[Callable[..., Any]],
    inputs: list[tuple[Any, ...]],
    budget: float,
    flush: bool = False,
) -> list[float]:
    """Median time of each function, called in turns until the budget (seconds) is spent."""
    times: list[list[float]] = [[] for _ in functions]
    for f in functions:
        for args in inputs[:2]:
            f(*args)
    torch.cuda.synchronize()
    spent, i = 0.0, 0
    while (spent < budget * 1e3 and i < 500) or i < 8:
        for f, t in zip(functions, times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if flush:
                flush_l2()
            torch.cuda._sleep(200_000)  # 0.1 ms, so that the launch's own time on the host does not count
            start.record()
            f(*inputs[i % len(inputs)])
            end.record()
            end.synchronize()
            t.append(start.elapsed_time(end))
            spent += t[-1]
        i += 1
    return [statistics.median(t) for t in times]


def limits() -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and operations a second of large matrix products."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    (copy,) = milliseconds([b.copy_], [(a,)], 0.2)
    found = {"copy_bytes_per_s": 2 * a.numel() * 4 / copy * 1e3}
    del a, b
    before = torch.backends.cuda.matmul.allow_tf32
    for name in RATES:
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16 if name == "bf16" else torch.float32)
        if name == "int8":
            m = m.mul_(40).clamp_(-127, 127).to(torch.int8)
            (product,) = milliseconds([lambda m=m: torch._int_mm(m, m.T)], [()], 0.2)
        else:
            (product,) = milliseconds([lambda m=m: m @ m], [()], 0.2)
        found[f"{name}_flops_per_s"] = 2 * 8192**3 / product * 1e3
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def kernels(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> list[tuple[str, int, float]]:
    """What a call runs on the device: name, launches and milliseconds of each kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    calls = 10
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for i in range(calls):
            function(*inputs[i % len(inputs)])
        torch.cuda.synchronize()
    rows = [
        (event.key, round(event.count / calls), event.self_device_time_total / calls / 1e3)
        for event in record.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[2])


def near(rtol: float = 1e-4, atol: float = 1e-4) -> Callable[[Any, Any], None]:
    def check(ours: Any, theirs: Any) -> None:
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol)

    return check


def same_neighbours(ours: Any, theirs: Any) -> None:
    """Scores agree, and all but near ties are the same ids."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
    same = (ours[1].sort(1)[0] == theirs[1].sort(1)[0]).float().mean()
    assert same > 0.995, f"only {same:.4f} of the neighbours are torch's"
