"""Learning the balanced trees of MADDNESS (arXiv 2106.10860, section 4.1), all tables in turn."""

from __future__ import annotations

import torch
from torch import Tensor


def learn_tree(x: Tensor, metric: Tensor, bits: int, candidates: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A tree of ``bits`` levels whose leaves are close together under a metric.

    All nodes of a level split on one dimension, each at its own threshold: the dimension is the best of the
    ``candidates`` that vary most within the nodes, the thresholds minimise the sum of squared distances to
    the two children's means.

    Parameters
    ----------
    x : Tensor, shape (n, size)
    metric : Tensor, shape (r, size)
        Distances are taken between ``metric @ x``.

    Returns
    -------
    dims : Tensor, shape (bits,), int64
    thresholds : Tensor, shape (2**bits - 1,)
        Right where the value is greater than or equal; infinite for a node that is not split.
    leaves : Tensor, shape (n,), int64
    """
    n, size = x.shape
    y = x @ metric.t()
    leaves = torch.zeros(n, dtype=torch.int64)
    dims = torch.zeros(bits, dtype=torch.int64)
    thresholds = torch.full((2**bits - 1,), float("inf"), dtype=x.dtype)
    weight = metric.square().sum(0)
    for level in range(bits):
        nodes = 1 << level
        spread = within(x, leaves, nodes) * weight
        best = None
        for dim in spread.topk(min(candidates, size)).indices.tolist():
            loss, at = best_splits(x[:, dim], y, leaves, nodes)
            if best is None or loss < best[0]:
                best = loss, dim, at
        assert best is not None
        dims[level] = best[1]
        thresholds[nodes - 1 : 2 * nodes - 1] = best[2]
        leaves = 2 * leaves + (x[:, best[1]] >= best[2][leaves])
    return dims, thresholds, leaves


def within(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum of squared distances to the group's mean, dimension by dimension."""
    size = torch.bincount(groups, minlength=count).clamp(min=1).to(x.dtype).unsqueeze(1)
    mean = x.new_zeros(count, x.shape[1]).index_add_(0, groups, x) / size
    return (x - mean[groups]).square().sum(0)


def best_splits(values: Tensor, y: Tensor, groups: Tensor, count: int) -> tuple[float, Tensor]:
    """The best threshold of each group on one dimension, and the loss that all of them leave.

    Rows are sorted by group and value; prefix sums give the loss of every split of every group at once.
    """
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    v, g = values[order], groups[order]
    sizes = torch.bincount(groups, minlength=count)
    begin = sizes.cumsum(0) - sizes
    total = torch.zeros(len(y) + 1, y.shape[1], dtype=torch.float64)
    total[1:] = y[order].double().cumsum(0)
    # Left of a split before row i lie the rows begin..i-1, right of it i..end-1. What the split saves is
    # |sum left|^2 / n_left + |sum right|^2 / n_right.
    i = torch.arange(len(y))
    left = (i - begin[g]).double()
    right = sizes[g].double() - left
    sum_left = total[i] - total[begin[g]]
    sum_right = total[begin[g] + sizes[g]] - total[i]
    saved = sum_left.square().sum(1) / left.clamp(min=1) + sum_right.square().sum(1) / right.clamp(min=1)
    same = torch.zeros(len(y), dtype=torch.bool)
    same[1:] = (v[1:] == v[:-1]) & (g[1:] == g[:-1])
    saved[same] = -1.0  # equal values cannot be parted
    best = torch.full((count,), -1.0, dtype=torch.float64).scatter_reduce_(0, g, saved, "amax")
    first = torch.full((count,), len(y)).scatter_reduce_(0, g[saved == best[g]], i[saved == best[g]], "amin")
    thresholds = torch.full((count,), float("inf"), dtype=values.dtype)
    filled = sizes > 0
    at = first[filled]
    previous = torch.where(at > begin[filled], v[(at - 1).clamp(min=0)], v[at])
    thresholds[filled] = torch.maximum((v[at] + previous) / 2, torch.nextafter(previous, v[at]))
    return -float(best[filled].sum()), thresholds
