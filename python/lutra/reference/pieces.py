"""Reference of rows made of pieces; see `lutra.gather.bag_pieces`."""

from __future__ import annotations

import numpy as np

from .gather import _wide, check_ids

PRIME = 2038074743


def addresses(kind, numbers, ids, stored=None):
    """Rows of the table (n, m) int64 for ids (n,), and signs (n, m) float32 or None.

    For 'robe' they are elements of the array, at which pieces begin. Every number fits int64: torch's
    composition (`lutra.gather._pieces.compose`) does the same.
    """
    x: np.ndarray = np.asarray(ids, np.int64).reshape(-1, 1)
    a = np.array(numbers, np.int64)
    if kind == "codes":
        m, bits = numbers
        return unpack(stored[x[:, 0]], m, bits) + (np.arange(m) << bits), None
    if kind == "digits":
        m, q, t = numbers
        digits = []
        for j in range(m - 1):
            digits.append(j * t + x % q)
            x = x // q
        return np.concatenate([*digits, (m - 1) * t + x], 1), None  # the last digit is all that is left
    if kind == "qr":
        c, n = numbers
        return np.concatenate([x // c, n + x % c], 1), None
    if kind == "hash":
        m, n = numbers[:2]
        return (a[2 : 2 + m] * (x % PRIME) + a[2 + m :]) % PRIME % n, None
    if kind == "robe":
        m, n, h, chunk, shift, sign_h, sign_chunk, sign_shift = numbers
        x, every = x % PRIME, np.arange(m)
        odd = (sign_h * x + sign_chunk * every + sign_shift) % PRIME % 2
        return (h * x + chunk * every + shift) % PRIME % n, (1 - 2 * odd).astype(np.float32)
    if kind == "modulo":
        return x % numbers[0], None
    s, _ = numbers
    return stored[x // s].astype(np.int64) * s + x % s, None


def unpack(codes, m, bits):
    """Entries (n, m) int64 of packed codes (n, bytes) uint8: entry j in the bits [j bits, (j + 1) bits)."""
    first = np.arange(m) * bits
    padded = np.pad(codes, ((0, 0), (0, 2))).astype(np.int64)
    byte = first // 8
    word = padded[:, byte] | padded[:, byte + 1] << 8 | padded[:, byte + 2] << 16
    return word >> first % 8 & (1 << bits) - 1


def rows(kind, numbers, combine, table, ids, stored=None, piece_weights=None, width=0):
    """Rows (n, dim) float32 (float64 for float64 tables)."""
    index, signs = addresses(kind, numbers, ids, stored)
    table = _wide(table)
    if kind == "robe":
        pieces = table.reshape(-1)[(index[..., None] + np.arange(width)) % table.size]
    else:
        pieces = table[index]
    if signs is not None:
        pieces = pieces * signs[..., None]
    if piece_weights is not None:
        pieces = pieces * _wide(piece_weights)[ids][..., None]
    if combine == "concat":
        return pieces.reshape(len(pieces), pieces.shape[1] * pieces.shape[2])  # -1 fails where there are none
    if combine == "sum":
        return pieces.sum(1)
    return pieces.prod(1)


def checked_rows(ids, offsets, count, include_last_offset):
    """Ids as the rows are wanted, those that belong to no bag as 0; IndexError as `check_ids`."""
    check_ids(ids, offsets, count, include_last_offset)
    flat = ids.reshape(-1).astype(np.int64)
    return np.where((flat >= 0) & (flat < count), flat, 0)
