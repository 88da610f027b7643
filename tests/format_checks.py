"""What the tests of formats share: a small table of a format, and bags by the reference."""

from __future__ import annotations

import functools

import numpy as np

from lutra.compress import FORMATS, Format, Table
from lutra.reference import gather as reference

#: Shapes of tables: ordinary, odd in both, fewer rows than a code book has entries.
SHAPES = ((97, 16), (65, 17), (40, 33))


@functools.cache
def some_format(name: str, shape: tuple[int, int]) -> Format | None:
    """Parameters of a format that fit a table of that shape: those of some budget."""
    cls = FORMATS[name]
    for share in (0.5, 0.3, 0.75, 1.0, 2.0, 4.0, 8.0):
        found = cls.fit(shape, int(shape[0] * shape[1] * 4 * share))
        if found is not None:
            return found
    return None


@functools.cache
def _encoded(name: str, shape: tuple[int, int]):
    found = some_format(name, shape)
    if found is None:
        return None
    return found, found.encode(dense(shape), seed=1, progress=False)


def dense(shape: tuple[int, int]) -> np.ndarray:
    """A table with some structure: a low-rank part and noise."""
    rng = np.random.default_rng(shape[0])
    a, b = rng.standard_normal((shape[0], 4)), rng.standard_normal((4, shape[1]))
    return (a @ b / 2 + 0.3 * rng.standard_normal(shape)).astype(np.float32)


def table(name: str, shape: tuple[int, int]) -> Table | None:
    """A table in a format (NumPy, fresh copies); None where the format cannot store that shape."""
    made = _encoded(name, shape)
    if made is None:
        return None
    found, data = made
    return Table(found, shape, {k: v.copy() for k, v in data.items()})


def as_torch(t: Table, dtype=None) -> Table:
    """The same table of torch tensors; floats that are trainable require gradients."""
    import torch

    arrays = t.format.arrays(t.shape)
    data = {}
    for k, v in t.data.items():
        value = torch.from_numpy(v.copy())
        if value.is_floating_point() and dtype is not None:
            value = value.to(dtype)
        if arrays[k].trainable and value.is_floating_point():
            value.requires_grad_(True)
        data[k] = value
    return Table(t.format, t.shape, data)


def bag(t: Table, ids, offsets=None, weights=None, **options) -> np.ndarray:
    """The reference's bag of the reference's rows."""
    rows = t.format.rows(t.data, t.shape, np.arange(t.shape[0]))
    return reference.bag(
        rows, ids, offsets, weights, None, None, options.get("mode", "sum"), options.get("padding_idx"),
        options.get("include_last_offset", False),
    )  # fmt: skip
