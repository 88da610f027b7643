"""Reference of the scans of inverted lists (`lutra.scan._lists`)."""

from __future__ import annotations

import numpy as np

from .scan import select


def _rows_of_probes(probes, list_begin, list_rows, nprobe):
    """For one query: rows of its probed lists, and the place of the probe that found each."""
    rows, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for place in range(nprobe):
        if probes[place] >= 0:
            count = int(list_rows[probes[place]])
            rows.append(int(list_begin[probes[place]]) + np.arange(count))
            places.append(np.full(count, place))
    return np.concatenate(rows), np.concatenate(places)


def search(score, nq, lists, k, metric):
    """The k best of the rows in each query's lists; ``score(query, rows, places)`` gives their scores.

    ``lists`` begins with (list_begin, list_rows, positions, npositions, keep, probes).
    """
    list_begin, list_rows, positions, npositions, keep, probes = lists[:6]
    scores = np.empty((nq, k), np.float32)
    ids = np.empty((nq, k), np.int64)
    for i in range(nq):
        if probes is None:
            rows = np.arange(int(list_rows[0]))
            places = np.zeros(len(rows), np.int64)
        else:
            rows, places = _rows_of_probes(probes[i], list_begin, list_rows, probes.shape[1])
        where = rows if positions is None else positions[rows].astype(np.int64)
        there = where >= 0
        if (where[there] >= npositions).any():
            raise ValueError(f"a position is not below {npositions}")
        rows, places, where = rows[there], places[there], where[there]
        if keep is not None:
            kept = keep[where >> 3] >> (where & 7) & 1 == 1
            rows, places, where = rows[kept], places[kept], where[kept]
        found = score(i, rows, places)
        if np.isnan(found).any():
            raise ValueError(f"the score of position {int(where[np.isnan(found)].min())} is NaN")
        scores[i : i + 1], ids[i : i + 1] = select(found[None].astype(np.float32), where[None], k, metric)
    return scores, ids


def list_rows(q, x, lists, k, metric):
    """``x`` (blocks, d, 16): 16 rows a block, interleaved; scores in float32."""
    rows_of = np.asarray(x).transpose(0, 2, 1).reshape(-1, x.shape[1])

    def score(i, rows, places):
        values = rows_of[rows].astype(np.float32)
        return np.square(q[i] - values).sum(1) if metric == "l2" else (q[i] * values).sum(1)

    return search(score, len(q), lists, k, metric)


def scalar_codes(rows, bits, d):
    """Bytes of rows of scalar codes (n, bytes) as codes (n, d), by the layout of csrc/scan/list_scalar.h."""
    if bits == 8:
        return rows
    n, groups = len(rows), (d + 3) // 4
    three = np.zeros((n, groups, 3), np.uint8)
    three.reshape(n, 3 * groups)[:, : rows.shape[1]] = rows
    four = np.empty((n, groups, 4), np.uint8)
    four[:, :, :3] = three & 63
    four[:, :, 3] = three[:, :, 0] >> 6 | three[:, :, 1] >> 6 << 2 | three[:, :, 2] >> 6 << 4
    return four.reshape(n, 4 * groups)[:, :d]


def scalar_rows(codes, bits):
    """Codes (n, d) as bytes of rows: the inverse of `scalar_codes`."""
    if bits == 8:
        return codes
    n, d = codes.shape
    groups = (d + 3) // 4
    four = np.zeros((n, groups, 4), np.uint8)
    four.reshape(n, 4 * groups)[:, :d] = codes
    last = four[:, :, 3:]
    three = four[:, :, :3] | (last >> np.array([0, 2, 4], np.uint8) & 3) << 6
    return three.reshape(n, 3 * groups)[:, : (d * bits + 7) // 8]


def list_scalar(q, codes, bits, step, offset, centroids, lists, k, metric):
    """``codes`` (blocks, bytes, 16): decoded as code * step + (offset + centroid), then scored in float32."""
    d = q.shape[1]
    bytes_of = np.asarray(codes).transpose(0, 2, 1).reshape(-1, codes.shape[1])
    probes = lists[5]

    def score(i, rows, places):
        shift = offset if centroids is None else offset + centroids[probes[i, places]]
        x = scalar_codes(bytes_of[rows], bits, d).astype(np.float32) * step + shift
        return np.square(q[i] - x).sum(1) if metric == "l2" else (q[i] * x).sum(1)

    return search(score, len(q), lists, k, metric)


def lut8(lut, codes, base, bias, add, mul, lists, k, metric, bits=8):
    """Sums of look-ups, j in increasing order, in float32; code j is bits [j bits, (j + 1) bits) of a row."""
    m, ksub = lut.shape[1:]
    planes = np.unpackbits(codes, axis=1, count=m * bits, bitorder="little").reshape(len(codes), m, bits)
    codes = np.packbits(planes, axis=2, bitorder="little").reshape(len(codes), m)

    def score(i, rows, places):
        entries = codes[rows]
        if (entries >= ksub).any():
            raise ValueError(f"a code is not below {ksub}")
        total = np.zeros(len(rows), np.float32)
        for j in range(codes.shape[1]):
            total += lut[i, j, entries[:, j]]
        if mul is not None:
            total *= mul[rows]
        constant = np.float32(0 if bias is None else bias[i])
        total += constant if base is None else base[i, places] + constant
        return total if add is None else total + add[rows]

    return search(score, len(lut), lists, k, metric)
