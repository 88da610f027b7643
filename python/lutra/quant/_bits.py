"""Packing of entries of b bits, as in FAISS: entry j takes bits [j b, (j + 1) b) of a row, lowest first."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import U8


def packed_size(m: int, bits: int) -> int:
    """Bytes of m entries."""
    return (m * bits + 7) // 8


def pack(entries: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) entries below 2**bits as (n, ceil(m * bits / 8)) bytes; the last bits are 0."""
    n, m = entries.shape
    if bits == 8:
        return np.ascontiguousarray(entries)
    if bits in (2, 4):
        per, out = 8 // bits, np.zeros((n, packed_size(m, bits)), np.uint8)
        for j in range(per):
            part = entries[:, j::per]
            out[:, : part.shape[1]] |= part << (j * bits)
        return out
    planes = np.unpackbits(entries[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(planes.reshape(n, m * bits), axis=1, bitorder="little")


def pack_there(home: Any, entries: Any, bits: int) -> Any:
    """`pack` of an array in a home; 1, 2, 4 or 8 bits."""
    if bits == 8:
        return entries
    per, (n, m) = 8 // bits, entries.shape
    out = home.full((n, packed_size(m, bits)), 0, U8)
    for j in range(per):
        part = entries[:, j::per]
        out[:, : part.shape[1]] |= part << (j * bits)
    return out


def unpack(codes: np.ndarray, m: int, bits: int) -> np.ndarray:
    """The inverse of `pack`: (n, bytes) to (n, m) uint8."""
    if bits == 8:
        return np.ascontiguousarray(codes[:, :m])
    n = len(codes)
    if bits in (2, 4):
        per, out = 8 // bits, np.empty((n, m), np.uint8)
        for j in range(per):
            part = out[:, j::per]
            part[:] = (codes[:, : part.shape[1]] >> (j * bits)) & ((1 << bits) - 1)
        return out
    planes = np.unpackbits(codes, axis=1, count=m * bits, bitorder="little")
    return np.packbits(planes.reshape(n, m, bits), axis=2, bitorder="little")[:, :, 0]
