"""Random rotations."""

from __future__ import annotations

import numpy as np


def random_rotation(d: int, seed: int) -> np.ndarray:
    """A rotation (d, d) drawn uniformly by ``seed``: the Q of a Gaussian matrix, its signs made unique."""
    gaussian = np.random.default_rng(seed).standard_normal((d, d))
    q, r = np.linalg.qr(gaussian)
    return (q * np.where(np.diagonal(r) < 0, -1.0, 1.0)).astype(np.float32)


def check_rotation(matrix: np.ndarray, name: str) -> None:
    """A ValueError unless the rows of ``matrix`` are orthonormal, as far as float32 goes."""
    gram = matrix.astype(np.float64) @ matrix.T.astype(np.float64)
    if not np.allclose(gram, np.eye(len(matrix)), atol=1e-3):
        raise ValueError(f"{name!r} is no rotation")
