"""The normative definition of every op, in NumPy.

Same names and shapes as the public ops; slow and plain. Every kernel is tested against it, and the whole
package runs on it alone (``LUTRA_BACKEND=reference``, or an install with ``LUTRA_PURE_PYTHON=1``).
Arithmetic is float64 where the input is float64, else float32 or wider.
"""

from . import (
    address,
    attention,
    binary,
    blocks,
    csr,
    fde,
    fgrams,
    gather,
    graph,
    hashes,
    maxsim,
    packed,
    quant,
    row_update,
    scan,
    screen,
    train,
    triggers,
)

__all__ = [
    "address",
    "attention",
    "binary",
    "blocks",
    "csr",
    "fde",
    "fgrams",
    "gather",
    "graph",
    "hashes",
    "maxsim",
    "packed",
    "quant",
    "row_update",
    "scan",
    "screen",
    "train",
    "triggers",
]
