"""factory: an index from a text in FAISS's words."""

from __future__ import annotations

from typing import Any

from .. import _checks
from . import _factory_text
from ._factory_steps import wrap
from ._factory_text import Code, Plan
from .base import Index
from .binary import Binary
from .codes import Codes
from .flat import Flat
from .ivf import IVF

_METRICS = {"ip": 0, "l2": 1, "cosine": 2, "l1": 3, "linf": 4, "poincare": 5, "hamming": 6, "jaccard": 7}
_FLAT_ONLY = ("l1", "linf", "poincare")
_HALF = {"float16": "fp16", "bfloat16": "bf16"}


def factory(text: str, d: int, metric: str = "l2") -> Any:
    """An empty index, described in the words of FAISS's index factory.

    Parameters
    ----------
    text : str
        Parts with commas between them, in this order:

        ======================== =====================================================================
        ``IDMap``                accepted and ignored here or at the end: all indexes have ids
        ``PCA64``                principal components; ``PCAR`` rotated at random after, ``PCAW`` whitened
        ``OPQ32``, ``OPQ32_64``  rotation learnt for 32 sub-vectors (of 64 dimensions in all)
        ``RR``, ``RR64``         random rotation (to 64 dimensions)
        ``L2norm``               vectors and queries of unit norm
        ``IVF1024``              1024 lists; ``_HNSW32`` behind is accepted, centroids are scanned exactly;
                                 ``IVF1024_SOAR``: with second lists (not FAISS's)
        ``HNSW32``               a graph with 32 links over ``Flat`` (or nothing), ``SQ8``, ``SQfp16``,
                                 ``PQ32`` (``HNSW32,PQ32`` or ``HNSW32_PQ32``)
        ``Flat``                 the vectors; narrower: ``SQfp16 SQbf16 SQ8_direct SQ8_direct_signed``
        ``PQ32``, ``PQ16x6``     32 sub-vectors, of 8 (6) bits each; ``PQ32x4fs`` is ``PQ32x4``
        ``SQ8 SQ6 SQ4``          scalar quantization
        ``RaBitQ``, ``RaBitQ4``  1 (4) bits a dimension after a random rotation
        ``RQ8x8``                residual quantization, 8 steps of 8 bits
        ``RSQ4``                 random rotation, 4-bit scalar codes with one codebook (not FAISS's)
        ``RFlat``                keep the vectors, rank the best again; ``Refine(SQfp16)``, ``Refine(SQ8)``
        ======================== =====================================================================

        Vectors are kept for refining as they are behind the transforms, so what PCA left out stays out; FAISS
        keeps them as they come. PCA subtracts the mean for 'l2' only, so that inner products stay.

        With ``metric='hamming'`` or ``'jaccard'``: ``BFlat``.
    d : int
        Dimension of the vectors (bits for a binary index).
    metric : {'l2', 'ip', 'cosine', 'l1', 'linf', 'poincare', 'hamming', 'jaccard'}, default 'l2'
        'l1', 'linf' and 'poincare' for ``Flat`` and its narrower types only.

    Returns
    -------
    Index
        `Flat`, `PQ`, `Codes`, `IVF`, `HNSW` or `Binary`, in `Transformed` where there are transforms. Call
        ``train(x)`` and ``add(x)``.

    Raises
    ------
    ValueError
        The part that is not understood and what could stand there, or what does not fit (sub-vectors that do
        not divide the dimension).

    Examples
    --------
    >>> import lutra
    >>> lutra.index.factory("Flat", 64, metric="cosine").metric
    'cosine'
    """
    d = _checks.integer("d", d, 1)
    _checks.choice("metric", metric, _METRICS)
    plan = _factory_text.read(text, d, metric)
    if metric in _FLAT_ONLY and (plan.code.kind != "Flat" or plan.nlist or plan.graph or plan.steps):
        raise ValueError(f"factory text {text!r}: metric={metric!r} is for Flat only, without transforms")
    try:
        return _build(plan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"factory text {text!r}: {error}") from error


def _build(plan: Plan) -> Any:
    if plan.is_binary:
        return Binary(plan.d, plan.metric)
    inner = _core(plan)
    return wrap(plan, inner) if plan.steps else inner


def _core(plan: Plan) -> Index:
    """The index behind the transforms."""
    d, metric, code = plan.inner, plan.metric, plan.code
    refine = plan.refine
    if plan.graph is not None:
        from .hnsw import HNSW

        storage = _quantizer(code, d) if code.kind == "PQ" else _storage(code)
        return HNSW(d, plan.graph, metric, storage=storage, refine=refine)
    if plan.nlist is not None:
        quantizer = code.name if code.kind == "Flat" else _quantizer(code, d)
        if quantizer == "float32":
            refine = None  # what the lists hold is exact
        return IVF(d, plan.nlist, quantizer, metric, soar=plan.soar, refine=refine)
    if code.kind == "Flat" and (refine is None or code.name == "float32"):
        return Flat(d, metric, dtype=code.name)
    return Codes(_quantizer(code, d), metric, refine=refine)


def _storage(code: Code) -> str:
    return "int8" if code.kind == "SQ" else code.name


def _quantizer(code: Code, d: int) -> Any:
    from .. import quant

    if code.kind == "PQ":
        return quant.PQ(d, code.m, code.bits)
    if code.kind == "RQ":
        return quant.RQ(d, code.m, code.bits)
    if code.kind == "RaBitQ":
        return quant.RaBitQ(d, code.bits)
    if code.kind == "RSQ":
        return quant.RotatedSQ(d, code.bits)
    return quant.SQ(d, _HALF.get(code.name, code.name))
