"""Feature families: latents of a sparse autoencoder that occur together, as trees."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _checks


class Family(NamedTuple):
    """A latent and those that specialise it.

    Attributes
    ----------
    parent : int
    children : ndarray, int64
        All latents below the parent, the nearest first.
    depth : ndarray, int64
        Edges between the parent and each child.
    strength : float
        Mean weight of the family's edges.
    """

    parent: int
    children: np.ndarray
    depth: np.ndarray
    strength: float


def _numpy(a: Any) -> np.ndarray:
    if hasattr(a, "detach"):
        a = a.detach().cpu()
    return np.asarray(a)


def co_activation(values: Any, ids: Any, num_latents: int) -> Any:
    """How often latents are active together.

    Parameters
    ----------
    values, ids : array, shape (samples, k)
        Of `TopKSAE.encode`; a latent is active where its value is positive.
    num_latents : int

    Returns
    -------
    scipy.sparse.csr_matrix, shape (num_latents, num_latents), int64
        Entry (i, j) counts the samples in which both are active; the diagonal counts each one's.
    """
    from scipy import sparse

    values, ids = _numpy(values), _numpy(ids)
    if values.shape != ids.shape or values.ndim != 2:
        raise ValueError(f"values has shape {values.shape}, ids {ids.shape}; both must be (samples, k)")
    n = _checks.integer("num_latents", num_latents, 1)
    if ids.size and (ids.min() < 0 or ids.max() >= n):
        raise IndexError(f"ids must lie in [0, {n}), got {ids.min()} to {ids.max()}")
    row, column = np.nonzero(values > 0)
    ones = np.ones(len(row), np.int64)
    active = sparse.csr_matrix((ones, (row, ids[row, column])), shape=(len(ids), n))
    return (active.T @ active).tocsr()


def feature_families(
    values: Any,
    ids: Any,
    num_latents: int,
    *,
    min_share: float = 0.5,
    min_count: int = 10,
    max_density: float = 0.5,
    rounds: int = 3,
    min_size: int = 3,
    max_overlap: float = 0.6,
) -> list[Family]:
    """Families of latents, from the maximum spanning forest of their co-activation.

    The weight of an edge is the share of the rarer latent's samples in which the more frequent one is active
    too. The maximum spanning forest keeps for every latent its strongest ties; its edges point from the more
    frequent latent to the rarer one, and what can be reached from a latent to which none points is its
    family. Then the parents are taken out and the next families are found, so that families may overlap.

    Parameters
    ----------
    values, ids : array, shape (samples, k)
        Codes, as from `TopKSAE.encode`.
    num_latents : int
    min_share : float, default 0.5
        Edges of less weight are left out.
    min_count : int, default 10
        Latents that fewer samples use are left out.
    max_density : float, default 0.5
        Latents that a greater share of the samples use are left out: they go with everything.
    rounds : int, default 3
        How often parents are taken out.
    min_size : int, default 3
        Latents that a family must have, with its parent.
    max_overlap : float, default 0.6
        Of two families that share a greater part of their union, the first stays.

    Returns
    -------
    list of Family
        The largest first, equal ones by parent.

    Notes
    -----
    Needs scipy. Cost: the pairs of active latents of all samples, samples * k ** 2.

    References
    ----------
    O'Neill, Ye, Iyer and Wu, Disentangling Dense Embeddings with Sparse Autoencoders, 2024, arXiv 2408.00657.
    (There the weights are co-activations over the density of one latent, and edges are cut by a threshold
    likewise.)

    Examples
    --------
    >>> import numpy as np, lutra.nn
    >>> ids = np.array([[0, 1], [0, 2], [0, 1], [0, 2], [3, 4], [3, 4]])
    >>> lutra.nn.feature_families(np.ones((6, 2)), ids, 5, min_count=1, max_density=1)[0].children
    array([1, 2])
    """
    from scipy import sparse
    from scipy.sparse.csgraph import minimum_spanning_tree

    for name, share in (("min_share", min_share), ("max_density", max_density), ("max_overlap", max_overlap)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share!r}")
    _checks.integer("rounds", rounds, 1)
    together = co_activation(values, ids, num_latents).tocoo()
    counts = np.zeros(num_latents, np.int64)
    diagonal = together.row == together.col
    counts[together.row[diagonal]] = together.data[diagonal]
    alive = (counts >= min_count) & (counts <= max_density * len(ids))

    above = _denser(counts, together.row, together.col)  # each pair once, from the denser to the rarer
    row, column, both = (a[above] for a in (together.row, together.col, together.data))
    weight = both / counts[column]
    near = both / (counts[row] + counts[column] - both)  # of equal weights, the nearest in frequency
    keep = (weight >= min_share) & alive[row] & alive[column]
    row, column, weight, near = row[keep], column[keep], weight[keep], near[keep]

    families: list[Family] = []
    for _ in range(rounds):
        if not len(row):
            break
        # csgraph takes 0 for no edge and keeps the least: the heaviest becomes the least.
        shape = (num_latents, num_latents)
        tree = minimum_spanning_tree(
            sparse.csr_matrix((2 - weight - 1e-6 * near, (row, column)), shape=shape)
        )
        tree, weights = tree.tocoo(), sparse.csr_matrix((weight, (row, column)), shape=shape)
        edges = np.asarray(weights[tree.row, tree.col]).reshape(-1)
        found = _descend(tree.row, tree.col, edges, num_latents)
        families += [f for f in found if 1 + len(f.children) >= min_size]
        parents = np.array([f.parent for f in found])
        keep = ~np.isin(row, parents) & ~np.isin(column, parents)
        row, column, weight, near = row[keep], column[keep], weight[keep], near[keep]
    families.sort(key=lambda f: (-len(f.children), f.parent))
    return _distinct(families, max_overlap)


def _denser(counts: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where a is used more than b (of equals: is the lower)."""
    return (counts[a] > counts[b]) | ((counts[a] == counts[b]) & (a < b))


def _descend(row: np.ndarray, column: np.ndarray, weight: np.ndarray, n: int) -> list[Family]:
    """What each latent without an edge to it reaches along edges row -> column."""
    order = np.lexsort((column, row))
    row, column, weight = row[order], column[order], weight[order]
    starts = np.searchsorted(row, np.arange(n + 1))
    pointed = np.zeros(n, bool)
    pointed[column] = True
    families = []
    for parent in np.unique(row[~pointed[row]]):
        children: list[int] = []
        depth: list[int] = []
        weights: list[float] = []
        seen, level = {int(parent)}, [int(parent)]
        while level:
            following = []
            for node in level:
                for e in range(starts[node], starts[node + 1]):
                    child = int(column[e])
                    weights.append(float(weight[e]))
                    if child not in seen:
                        seen.add(child)
                        following.append(child)
            children += following
            depth += [1 + (depth[-1] if depth else 0)] * len(following)
            level = following
        families.append(Family(int(parent), np.array(children), np.array(depth), float(np.mean(weights))))
    return families


def _distinct(families: list[Family], max_overlap: float) -> list[Family]:
    kept: list[tuple[Family, set[int]]] = []
    for family in families:
        members = {family.parent, *family.children.tolist()}
        if all(len(members & other) <= max_overlap * len(members | other) for _, other in kept):
            kept.append((family, members))
    return [family for family, _ in kept]
