"""Reference of the scans of vectors by block-sparse queries (`lutra.index.Blocks`)."""

from __future__ import annotations

import numpy as np

from .scan import nan_message, select


def tables(blocks, values, books):
    """Inner products (nnz, subs, ksub) of the parts of query blocks with the centroids of their sub-spaces.

    ``blocks`` (nnz,), ``values`` (nnz, width), ``books`` (sub-spaces, ksub, dsub); a block is cut into
    subs = width / dsub sub-spaces, which lie one after another.
    """
    nnz, width = values.shape
    _, ksub, dsub = books.shape
    subs = width // dsub
    mine = books.reshape(-1, subs, ksub, dsub)[blocks]
    return np.einsum("esd,escd->esc", values.reshape(nnz, subs, dsub), mine)


def panel_scores(ptr, blocks, values, panel, luts=None):
    """Inner products (nq, lanes) of block-sparse queries with the vectors of a panel.

    Query i has the blocks ``blocks[ptr[i] : ptr[i + 1]]`` with the values (width,) beside them; its other
    blocks are zero. ``panel`` (num_blocks, width, lanes) has the vectors in lanes; with ``luts`` (nnz, subs,
    ksub) it holds codes (num_blocks, subs, lanes), and ``score = sum luts[e, s, code]``.
    """
    scores = np.zeros((len(ptr) - 1, panel.shape[2]), np.float32)
    for i in range(len(ptr) - 1):
        own = slice(int(ptr[i]), int(ptr[i + 1]))
        part = panel[blocks[own]]
        if luts is None:
            scores[i] = np.einsum("bw,bwl->l", values[own], part.astype(np.float32))
        else:
            scores[i] = np.take_along_axis(luts[own], part.astype(np.int64), 2).sum((0, 1), dtype=np.float32)
    return scores


def blocks(ptr, blocks, values, panels, n, k, scale=None, books=None, keep=None):
    """Scores and positions (nq, k) of the best of n vectors for block-sparse queries.

    ``panels``: arrays (num_blocks, width or subs, lanes), the vectors one after another; the lanes behind the
    last are passed over. ``scale`` (n,): what a vector's score is multiplied by. ``books``: see `tables`;
    the panels then hold codes. ``keep``: packed bits of the positions that may be found. Best first, equal
    scores by position, padded with -1; a NaN score is a ValueError.
    """
    luts = None if books is None else tables(blocks, values, books)
    parts = [panel_scores(ptr, blocks, values, panel, luts) for panel in panels]
    scores = np.concatenate(parts, 1)[:, :n] if parts else np.zeros((len(ptr) - 1, 0), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        scores = scores if scale is None else scores * scale
    positions = np.arange(n)
    if keep is not None:
        positions = np.flatnonzero(np.unpackbits(keep, count=n, bitorder="little"))
        scores = scores[:, positions]
    wrong = np.isnan(scores)
    if wrong.any():
        raise ValueError(nan_message("the index", int(positions[wrong.any(0).argmax()]), "ip"))
    return select(scores, np.broadcast_to(positions, scores.shape), k)
