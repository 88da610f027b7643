"""A trained linear layer as a memory layer: choose a hash, then regress the tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ..address import sign_hash
from ..gather import tables as gather_tables
from ..torch_ops import ops
from ._hashes import tree_codes
from ._split_trees import learn_tree

METHODS = ("rotation", "tree")
RIDGES = (3.0, 30.0, 300.0)


@torch.no_grad()
def convert_linear(
    cls,
    linear,
    calibration_inputs: Tensor,
    method: str = "rotation",
    *,
    bits: int = 8,
    num_tables: int | None = None,
    score: str = "none",
    temperature: float = 1.0,
    held_back: float | Tensor = 0.1,
    ridge: float | None = None,
    iterations: int = 12,
    seed: int = 0,
):
    """A memory layer that does what a linear layer did, as well as it can: `MemoryLinear.from_linear`.

    Parameters
    ----------
    linear : torch.nn.Linear, or several of one input
        Several (queries, keys, values) become one layer of several outputs.
    calibration_inputs : Tensor, shape (..., rows, in_features)
        What the layer will see; some thousands of rows.
    method : {'rotation', 'tree'}, default 'rotation'
        'rotation': a dense projection onto the principal directions of the output, each compared with one or
        more thresholds. 'tree': MADDNESS, one balanced tree over ``in_features / num_tables`` values of the
        input for each table, no projection.
    bits : int, default 8
    num_tables : int, optional
        ``in_features / bits`` (for trees the next smaller divisor of ``in_features``) where not given.
    score : {'none', 'prob', 'scaled'}, default 'none'
        Weight of a row ('rotation' only).
    temperature : float, default 1.0
    held_back : float or Tensor, default 0.1
        The part of the inputs, or other inputs, on which the error is measured.
    ridge : float, optional
        Of the tables' regression; by default the best of 3, 30, 300 and none on a tenth of the calibration
        rows. Infinite: only what the bits (or a tree's chunk) do alone is fitted.
    iterations : int, default 12
        Of conjugate gradients.
    seed : int, default 0
        Of the choice of held-back rows.

    Returns
    -------
    MemoryLinear
        Its ``conversion_error`` holds the relative squared error ``|y' - y|^2 / |y - mean y|^2`` of
        'held_back' and 'calibration' rows, the numbers of rows, and the ridge.

    Raises
    ------
    TypeError, ValueError
        No Linear, several of different inputs, inputs of another width or with NaN, an unknown method.

    Notes
    -----
    The tables are fitted twice: first a vector for each bit (for trees the product with each leaf's mean
    input), which has few unknowns, then by ridge regression what is left. A sign says one bit of a direction:
    for inputs spread evenly over all directions 36 % of the squared error remain at ``in_features / bits``
    tables. 'rotation' also costs the projection's ``in_features * num_tables * bits`` multiplications, so it
    pays where several outputs share it or the output is wide.

    References
    ----------
    Blalock and Guttag, Multiplying Matrices Without Multiplying, ICML 2021, arXiv 2106.10860 (trees, ridge
    regression of the prototypes). Gong and Lazebnik, Iterative Quantization, CVPR 2011 (principal directions
    before sign hashing). Max, Quantizing for Minimum Distortion, 1960 (thresholds).
    """
    linears = [linear] if isinstance(linear, torch.nn.Linear) else list(linear)
    weight, bias, outputs = _stacked(linears)
    if method not in METHODS:
        raise ValueError(f"method must be 'rotation' or 'tree'; got {method!r}")
    bits = _checks.integer("bits", bits, 1, 16)
    if ridge is not None and not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge!r}")
    features = weight.shape[1]
    if num_tables is None and method == "tree":
        num_tables = next(n for n in range(max(1, features // bits), 0, -1) if features % n == 0)
    elif num_tables is not None:
        num_tables = _checks.integer("num_tables", num_tables, 1)
    x, held = _inputs(calibration_inputs, features, held_back, seed)
    if method == "rotation":
        num_tables, rotation, offset = _learn_rotation(x, weight, bits, num_tables)
    single = isinstance(linear, torch.nn.Linear)
    like = linears[0].weight
    layer = cls(
        features, outputs[0] if single else tuple(outputs), bits, True, score, temperature=temperature,
        projection="dense" if method == "rotation" else None, num_tables=num_tables,
        hash="tree" if method == "tree" else "sign",
    )  # fmt: skip
    y = x @ weight.t()
    mean = y.mean(0)
    if method == "rotation":
        layer.projection.weight.copy_(rotation)
        layer.projection.bias.copy_(offset)
        start = None
    else:
        start = _learn_trees(layer, x, weight)
    codes, weights = _hash(layer, x)
    y -= mean
    start = _bitwise(codes, weights, y, bits, layer.score) if start is None else start
    residual = y - gather_tables(start, codes, weights)
    if ridge is None:
        ridge = _best_ridge(start, codes, weights, residual, iterations)
    layer.tables.copy_(start)
    if ridge < float("inf"):
        layer.tables += regress(start.shape, codes, weights, residual, float(ridge), iterations)
    layer.bias.copy_(mean + bias)
    layer.conversion_error = {
        "held_back": _relative_error(layer, held, weight, bias, mean),
        "calibration": _relative_error(layer, x, weight, bias, mean),
        "rows": len(x),
        "held_back_rows": len(held),
        "ridge": float(ridge),
    }
    return layer.to(device=like.device, dtype=like.dtype)


def _stacked(linears: Sequence[torch.nn.Linear]):
    """(weights, biases, sizes) of linear layers of one input, in float32 on the CPU."""
    for one in linears:
        if not isinstance(one, torch.nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear or several, got {type(one).__name__}")
    if not linears:
        raise ValueError("linear is empty; it must be a torch.nn.Linear or several")
    sizes = {one.in_features for one in linears}
    if len(sizes) > 1:
        raise ValueError(f"the linear layers have in_features {sorted(sizes)}; they must take one input")
    weight = torch.cat([one.weight.detach() for one in linears]).float().cpu()
    bias = torch.cat(
        [one.weight.new_zeros(one.out_features) if one.bias is None else one.bias.detach() for one in linears]
    ).float()
    return weight, bias.cpu(), [one.out_features for one in linears]


def _inputs(x, features, held_back, seed):
    """Calibration and held-back rows, float32 on the CPU."""
    x = _rows("calibration_inputs", x, features)
    if isinstance(held_back, Tensor):
        return x, _rows("held_back", held_back, features)
    if not 0 < held_back < 1:
        raise ValueError(f"held_back must be a tensor of inputs or a part in (0, 1), got {held_back!r}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    kept = min(len(x) - 1, max(1, round(len(x) * (1 - held_back))))
    return x[order[:kept]], x[order[kept:]]


def _rows(name, x, features):
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.dim() < 2 or x.shape[-1] != features:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (..., rows, {features})")
    x = x.detach().reshape(-1, features).float().cpu()
    if len(x) < 2:
        raise ValueError(f"{name} has {len(x)} rows; it must have 2 or more")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} row {int((~torch.isfinite(x)).any(1).int().argmax())} is not finite")
    return x


def _hash(layer, x):
    if layer.hash == "tree":
        return tree_codes(x, layer.split_dims, layer.thresholds)
    codes, weights = sign_hash(layer.projection(x), layer.bits, "prob", layer.temperature)
    if layer.score == "none":
        return codes, torch.ones_like(weights)
    return sign_hash(layer.projection(x), layer.bits, layer.score, layer.temperature)


def _relative_error(layer, x, weight, bias, mean) -> float:
    """Squared error over the outputs' variance about their mean on the calibration rows."""
    off = total = 0.0
    for part in x.split(2048):
        y = part @ weight.t()
        out = layer(part)
        out = torch.cat(out, -1) if isinstance(out, tuple) else out
        off += float((out - y - bias).square().sum(dtype=torch.float64))
        total += float((y - mean).square().sum(dtype=torch.float64))
    return off / max(total, 1e-300)


# ---------------------------------------------------------------- the hash
def _learn_rotation(x, weight, bits, num_tables):
    """The number of tables; a projection onto principal directions of the output, at the thresholds that pay.

    A direction u of the output is the direction ``weight.T @ u`` of the input; the principal ones are
    uncorrelated. Which get a second threshold, and a third, is decided by what the best quantizer with one
    more level takes off a normal distribution's squared error.
    """
    center = x.mean(0)
    covariance = sum(part.t() @ part for part in ((x - center) @ weight.t()).double().split(2048)) / len(x)
    variance, directions = torch.linalg.eigh(covariance)
    variance, directions = variance.flip(0).clamp(min=0).float(), directions.flip(1).float()
    rank = int((variance > variance.max() * 1e-9).sum())
    most = rank * (len(LLOYD_MAX) - 1)
    if num_tables is None:  # no more than the directions are good for
        num_tables = max(1, min(-(-x.shape[1] // bits), most // bits))
    if num_tables * bits > most:
        raise ValueError(
            f"num_tables * bits is {num_tables * bits}; the calibration outputs span {rank} directions, "
            f"enough for {most}: fewer tables, or other inputs"
        )
    levels = _allocate(variance[:rank], num_tables * bits)
    rows, offsets = [], []
    for count in sorted(set(levels.tolist()) - {1}):
        chosen = torch.nonzero(levels == count).squeeze(1)
        across = directions[:, chosen].t() @ weight / variance[chosen].sqrt().unsqueeze(1)
        limits = lloyd((x - center) @ across.t(), count)
        for i in range(count - 1):
            rows.append(across)
            offsets.append(-limits[:, i] - across @ center)
    # Neighbours in a chunk are directions of like variance; the tables hold what they do jointly.
    return num_tables, torch.cat(rows), torch.cat(offsets)


#: Least squared error of 1, 2, ... levels for a normal distribution of variance 1 (Max 1960).
LLOYD_MAX = (1.0, 0.3634, 0.1902, 0.1175, 0.0799, 0.0580, 0.0440, 0.0345, 0.0279)


def _allocate(variance: Tensor, bits: int) -> Tensor:
    """Levels of each direction, 1 where it is not hashed: the thresholds, ``bits`` in all, one by one."""
    gains = torch.tensor([a - b for a, b in itertools.pairwise(LLOYD_MAX)])
    best = (variance.unsqueeze(1) * gains).flatten().topk(bits).indices  # gains fall: the best are prefixes
    return 1 + torch.bincount(best // len(gains), minlength=len(variance))


def lloyd(values: Tensor, levels: int, iterations: int = 30) -> Tensor:
    """Thresholds of the best quantizer of each column, shape (columns, levels - 1)."""
    columns = values.t().contiguous()
    grid = (torch.arange(levels) + 0.5) / levels
    centers = torch.quantile(columns[:, :4096], grid, dim=1).t().contiguous()
    for _ in range(iterations):
        limits = (centers[:, 1:] + centers[:, :-1]) / 2
        at = torch.searchsorted(limits.contiguous(), columns)
        count = torch.zeros_like(centers).scatter_add_(1, at, torch.ones_like(columns))
        total = torch.zeros_like(centers).scatter_add_(1, at, columns)
        centers = torch.where(count > 0, total / count.clamp(min=1), centers)
    return (centers[:, 1:] + centers[:, :-1]) / 2


def _learn_trees(layer, x, weight) -> Tensor:
    """Trees in the layer's buffers; tables of products with the leaves' means, (tables, leaves, outputs)."""
    size = layer.in_features // layer.num_tables
    start = torch.empty_like(layer.tables)
    leaves = 1 << layer.bits
    for k in range(layer.num_tables):
        part = slice(k * size, (k + 1) * size)
        w = weight[:, part]
        values, vectors = torch.linalg.eigh((w.t() @ w).double())  # distances of outputs, in few dimensions
        metric = (values.clamp(min=0).sqrt() * vectors).t().float()
        dims, limits, at = learn_tree(x[:, part], metric, layer.bits)
        layer.split_dims[k], layer.thresholds[k] = dims, limits
        # An empty leaf takes the mean of the smallest subtree around it that is not empty.
        means = x[:, part].mean(0, keepdim=True)
        overall = means
        for level in range(1, layer.bits + 1):
            node = at >> (layer.bits - level)
            count = torch.bincount(node, minlength=1 << level).unsqueeze(1).float()
            total = torch.zeros(1 << level, size).index_add_(0, node, x[:, part])
            means = torch.where(count > 0, total / count.clamp(min=1), means.repeat_interleave(2, 0))
        assert len(means) == leaves
        start[k] = (means - overall) @ w.t()
    return start


# ---------------------------------------------------------------- the tables
def _bitwise(codes, weights, y, bits, score) -> Tensor:
    """Tables whose rows are sums of one vector a bit: the best such, by least squares.

    As few unknowns as the linear layer has, so they need few inputs; `regress` adds what bits do jointly.
    """
    n, tables = codes.shape
    signs = (codes.unsqueeze(2) >> torch.arange(bits, dtype=torch.int32) & 1).float() * 2 - 1
    constant = signs.new_ones(n, tables, 1)  # one a table where its weights vary; otherwise they are one
    features = torch.cat((signs, constant), 2) if score != "none" else signs
    per = features.shape[2]
    design = (features * weights.unsqueeze(2)).reshape(n, tables * per)
    gram = (design.t() @ design).double()
    gram.diagonal().add_(1e-4 * gram.diagonal().mean() + 1e-12)
    solution = torch.linalg.solve(gram, (design.t() @ y).double()).float().view(tables, per, -1)
    entries = torch.arange(1 << bits)
    patterns = (entries.unsqueeze(1) >> torch.arange(bits) & 1).float() * 2 - 1
    if score != "none":
        patterns = torch.cat((patterns, torch.ones(len(patterns), 1)), 1)
    return patterns @ solution


def regress(shape, codes: Tensor, weights: Tensor, y: Tensor, ridge: float, iterations: int) -> Tensor:
    """Tables T that minimise ``sum |tables(T, codes, weights) - y|^2 + ridge |T|^2``.

    Conjugate gradients for all outputs side by side, preconditioned with the diagonal; the products with the
    matrix of one-hot codes and its transpose are `lutra.gather.tables` and its gradient.
    """
    square = weights.square()
    ones = weights.new_ones(len(codes), 1)
    diagonal = ops.tables_backward(ones, y.new_zeros(*shape[:2], 1), codes, square, True, False)[0] + ridge
    t = y.new_zeros(shape)

    def transposed(r):
        return ops.tables_backward(r, t, codes, weights, True, False)[0]

    residual = transposed(y)
    z = residual / diagonal
    p, rho = z, (residual * z).sum((0, 1))
    for _ in range(iterations):
        q = transposed(gather_tables(p, codes, weights)).add_(p, alpha=ridge)
        step = rho / (p * q).sum((0, 1)).clamp(min=1e-30)
        t = t + step * p
        residual = residual - step * q
        z = residual / diagonal
        previous, rho = rho, (residual * z).sum((0, 1))
        p = z + (rho / previous.clamp(min=1e-30)) * p
    return t


def _best_ridge(start, codes, weights, residual, iterations) -> float:
    """The ridge of `RIDGES` that predicts a tenth of the rows best; infinite if none helps."""
    n = len(codes)
    kept = max(1, n - max(1, n // 10))
    columns = torch.arange(0, residual.shape[1], max(1, residual.shape[1] // 32))  # a few outputs will do
    y = residual[:, columns].contiguous()
    shape = (*start.shape[:2], len(columns))
    best = float(y[kept:].square().sum()), float("inf")
    for ridge in RIDGES:
        t = regress(shape, codes[:kept], weights[:kept], y[:kept], ridge, iterations)
        loss = float((gather_tables(t, codes[kept:], weights[kept:]) - y[kept:]).square().sum())
        best = min(best, (loss, ridge))
    return best[1]
