"""The CUDA kernels against torch and against the GPU's own limits.

    python benchmarks/cuda/bench_cuda.py [--quick] [--parts NAME ...] [--filter NAME] [--json FILE]

Each case checks its result against its peer's before it is timed: torch's, and in peers.py that of FAISS or
cuVS where they are installed. Times are medians of CUDA events around one call; inputs rotate so that no call
finds the data of the last one in the caches where a real one would not (or the cache is flushed); lutra and
the peer take turns. `share` is the time that the measured limit allows (bytes over copy bandwidth, or
operations over the rate of a large product of the case's type, whichever takes longer) over the time taken.
The cases are in the files beside this one, one for each part.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import GB, RATES, Case, captured, kernels, limits, milliseconds

from lutra import _backend

PARTS = ("address", "gather", "memory", "exact", "codes", "heads", "lists", "indexes", "peers")


def run(case: Case, limit: dict[str, float], budget: float) -> dict[str, Any]:
    """Check and time one case."""
    ours, inputs, theirs = case.build() if case.build else (case.ours, case.inputs, case.theirs)
    out = ours(*inputs[0])
    if case.check and theirs:
        case.check(out, theirs(*inputs[0]))
    del out
    functions = [f for f in (ours, theirs) if f]
    if case.graph:
        functions = [captured(f, inputs) for f in functions]
    times = milliseconds(functions, inputs, budget, case.flush)
    floor = 1e3 * max(case.bytes / limit["copy_bytes_per_s"], case.flops / limit[f"{case.rate}_flops_per_s"])
    return {
        "name": case.name,
        **case.numbers,
        "ms": times[0],
        "peer": case.peer,
        f"{case.peer}_ms": times[1] if len(times) > 1 else None,
        "ratio": times[1] / times[0] if len(times) > 1 else None,
        "gb_per_s": case.bytes / times[0] / 1e6,
        "tflops": case.flops / times[0] / 1e9,
        "share_of_limit": floor / times[0],
    }


def line(figure: dict[str, Any]) -> str:
    peer_ms, ratio = " " * 9, " " * 6
    if figure["ratio"] is not None:
        peer_ms, ratio = f"{figure[figure['peer'] + '_ms']:9.3f}", f"{figure['ratio']:6.2f}"
    return (
        f"{figure['name']:60} {figure['ms']:9.4f} {peer_ms} {ratio} {figure['gb_per_s']:6.0f} "
        f"{figure['tflops']:7.1f} {figure['share_of_limit']:6.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the data, less time")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="only these files")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="show the kernels of each case besides")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    usable, reason = _backend.cuda_status()
    if not usable or not torch.cuda.is_available():
        print(f"no CUDA benchmark: {reason if not usable else 'torch finds no CUDA device'}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    limit = limits()
    rates = ", ".join(f"{limit[f'{r}_flops_per_s'] / 1e12:.1f} {r}" for r in RATES)
    print(
        f"{torch.cuda.get_device_name()}: {limit['copy_bytes_per_s'] / GB:.0f} GB/s copy, TFLOP/s: {rates}\n"
    )
    print(f"{'case':60} {'lutra ms':>9} {'peer ms':>9} {'ratio':>6} {'GB/s':>6} {'TFLOP/s':>7} {'share':>6}")
    figures, failures = [], 0
    for part in options.parts:
        began = time.perf_counter()
        cases = importlib.import_module(part)
        for case in cases.cases(8 if options.quick else 1):
            if options.filter not in case.name:
                continue
            try:
                figure = run(case, limit, min(options.seconds, 0.1) if options.quick else options.seconds)
                print(line(figure), flush=True)
                if options.profile and case.ours:
                    for kernel, launches, took in kernels(case.ours, case.inputs)[:12]:
                        print(f"    {took:9.4f} ms  {launches:3} x  {kernel[:100]}")
            except Exception as error:  # one case that fails must not hide the others
                failures += 1
                figure = {"name": case.name, "error": f"{type(error).__name__}: {error}"}
                print(f"{case.name:60} failed: {figure['error'].splitlines()[0][:120]}", flush=True)
            figures.append({"part": part, **figure})
            del case
            torch.cuda.empty_cache()
        for library, why in getattr(cases, "missing", {}).items():
            print(f"{library:60} no cases: {why}")
        print(f"-- {part}: {time.perf_counter() - began:.0f} s", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"limits": limit, "cases": figures, "failures": failures}, indent=1)
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
