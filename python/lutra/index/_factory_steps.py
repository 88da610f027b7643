"""The transforms of `factory`'s words, and the one that only it makes: OPQ's rotation by itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from ._factory_text import Plan, Step
from ._home import HOST, to_float32
from .transformed import Transformed
from .transforms.base import Transform
from .transforms.linear import PCA, RandomRotation, _Linear
from .transforms.simple import Chain, Normalize

_SAMPLE = 1 << 16  # vectors that a rotation is learnt from


class OPQRotation(_Linear):
    """The rotation that `lutra.quant.OPQ` learns for m sub-vectors, as a transform of any index.

    Parameters
    ----------
    d_in, d_out : int
        Where d_out is less, the d_out principal components are rotated. m divides d_out.
    m, bits : int
        Of the product quantizer that it is learnt for.
    seed : int, default 0
    """

    def __init__(self, d_in: int, d_out: int, m: int, bits: int = 4, *, seed: int = 0) -> None:
        super().__init__(d_in, d_out)
        self.m = _checks.integer("m", m, 1)
        self.bits = _checks.integer("bits", bits, 1, 8)
        self.seed = _checks.integer("seed", seed, 0)
        if self.d_out > self.d_in or self.d_out % self.m:
            raise ValueError(
                f"d_out must be a multiple of m = {self.m} and at most d_in = {self.d_in}, got {self.d_out}"
            )

    def _learn(self, x):
        from ..quant import OPQ

        n = x.shape[0]
        rows = np.arange(n)
        if n > _SAMPLE:
            rows = np.sort(np.random.default_rng(self.seed).choice(n, _SAMPLE, replace=False))
        points = to_float32(HOST, HOST.bring(x)[rows], "x", rows)
        first = np.eye(self.d_in)
        if self.d_out < self.d_in:
            pca = PCA(self.d_in, self.d_out, center=False)
            pca.train(points)
            assert pca.matrix is not None
            points, first = pca.apply(points), pca.matrix
        learnt = OPQ(self.d_out, self.m, self.bits, seed=self.seed)
        learnt.train(points, progress=False)
        assert learnt.rotation is not None
        a = learnt.rotation.astype(np.float64) @ first
        self._set(a, a.T)

    def _config(self):
        return {**super()._config(), "m": self.m, "bits": self.bits, "seed": self.seed}


def wrap(plan: Plan, inner: Any) -> Transformed:
    """An index behind the transforms of a plan."""
    transforms: list[Transform] = []
    d = plan.d
    for step in plan.steps:
        transforms += _made(step, d, plan)
        d = step.d
    return Transformed(transforms[0] if len(transforms) == 1 else Chain(transforms), inner)


def _made(step: Step, d: int, plan: Plan) -> list[Transform]:
    if step.kind == "OPQ":
        return [OPQRotation(d, step.d, step.m, plan.code.bits if plan.code.kind == "PQ" else 8)]
    if step.kind == "RR":
        return [RandomRotation(d, step.d)]
    if step.kind == "L2norm":
        return [Normalize(d)]
    # A mean that is subtracted would change inner products: for distances only.
    pca = PCA(d, step.d, step.whiten, center=plan.metric == "l2")
    return [pca, RandomRotation(step.d)] if step.rotate else [pca]
