"""Transforms in front of an index: normalisation, PCA, whitening, rotations, prefixes.

Each maps vectors of d_in values to vectors of d_out. `Transformed` puts one in front of an index; `Chain`
makes one of several; `load` opens what ``transform.save`` wrote.
"""

from .base import Transform, load
from .linear import PCA, RandomRotation, Rotation, Whitening
from .simple import Chain, Normalize, Truncate

__all__ = [
    "PCA", "Chain", "Normalize", "RandomRotation", "Rotation", "Transform", "Truncate", "Whitening", "load",
]  # fmt: skip
