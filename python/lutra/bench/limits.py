"""The machine's own limits, measured: what no kernel can beat."""

from __future__ import annotations

from typing import NamedTuple

from .. import _backend


class Limits(NamedTuple):
    """Bytes read from memory and fp32 operations (multiply-adds) a second, with the threads in use."""

    bandwidth: float
    flops: float
    threads: int
    level: str

    @classmethod
    def measure(cls, quick: bool = False) -> Limits | None:
        """Measure them, in about a second; None on the reference, which has no compiled probes."""
        if _backend.core is None:
            return None
        threads = _backend.get_num_threads()
        bandwidth = _backend.core.measure_bandwidth(threads, (1 << 28) if quick else (1 << 30))
        return cls(bandwidth, _backend.core.measure_fma(threads), threads, _backend.simd_level())

    def seconds(self, bytes: float, flops: float) -> tuple[float, str]:
        """The shortest time for so many bytes from memory and operations, and which of the two sets it."""
        memory, arithmetic = bytes / self.bandwidth, flops / self.flops
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "FMA")
