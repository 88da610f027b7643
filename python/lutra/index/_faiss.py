"""FAISS's indexes and files, through FAISS's own Python interface."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ._home import HOST
from ._ids import Ids
from .codes import Codes
from .flat import Flat
from .ivf import IVF
from .pq import PQ

_READ = "IndexFlat, IndexPQ, IndexIVFFlat, IndexIVFPQ, in IndexIDMap, IndexRefineFlat or after L2norm"


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ImportError("FAISS's indexes need faiss: pip install faiss-cpu") from None
    return faiss


# ---- reading
def read_faiss(source: Any) -> Any:
    """An index from FAISS: of its files or its objects.

    Parameters
    ----------
    source : str, path-like or faiss.Index
        A file of ``faiss.write_index``, or an index. IndexFlat becomes `Flat`; IndexPQ `Codes`; IndexIVFFlat
        and IndexIVFPQ (with residuals or not) `IVF`; all also inside an IndexIDMap, with the exact vectors of
        an IndexRefineFlat, and behind a single L2 normalisation (which is ``metric='cosine'``).

    Returns
    -------
    Flat, Codes or IVF
        With the same vectors, codes, lists, centroids and ids: searches find the same. ``nprobe`` and the
        factor of refining are taken over.

    Raises
    ------
    ImportError
        faiss is not installed.
    TypeError
        ``source`` is neither a path nor an index of FAISS.
    ValueError
        A kind, metric or code size that has no counterpart; ids that repeat or are negative.
    """
    faiss = _faiss()
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if not os.path.exists(path):
            raise FileNotFoundError(2, "No such file", path)
        try:
            source = faiss.read_index(path)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a file that FAISS reads: {_short(error)}") from error
    if not isinstance(source, faiss.Index):
        raise TypeError(f"source must be a path or an index of FAISS, got {type(source).__name__}")
    return _convert(faiss, source, None, None, False)


def _short(error: Exception) -> str:
    return str(error).strip().split("\n")[0][-200:]


def _convert(
    faiss: Any, source: Any, ids: np.ndarray | None, refine: tuple[np.ndarray, int] | None, cosine: bool
) -> Any:
    index = faiss.downcast_index(source)
    kind = type(index).__name__
    if kind in ("IndexIDMap", "IndexIDMap2"):
        return _convert(faiss, index.index, faiss.vector_to_array(index.id_map), refine, cosine)
    if kind == "IndexRefineFlat":
        vectors = _vectors(faiss, faiss.downcast_index(index.refine_index))
        return _convert(faiss, index.base_index, ids, (vectors, max(1, round(index.k_factor))), cosine)
    if kind == "IndexPreTransform":
        return _convert(faiss, _behind_normalisation(faiss, index), ids, refine, True)
    metric = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "ip"}.get(index.metric_type)
    if metric is None or (cosine and metric == "l2"):
        raise ValueError(
            f"a {kind} with metric {index.metric_type}; the metrics here are L2 and inner product"
            f"{', the latter behind L2norm' if cosine else ''}"
        )
    metric = "cosine" if cosine else metric
    if kind in ("IndexFlat", "IndexFlatL2", "IndexFlatIP"):
        return _flat(_vectors(faiss, index), metric, ids)
    if kind == "IndexPQ":
        return _pq(faiss, index, metric, ids, refine)
    if kind in ("IndexIVFFlat", "IndexIVFPQ"):
        return _ivf(faiss, index, metric, ids, refine)
    raise ValueError(f"a {kind} has no counterpart here; {_READ} do")


def _behind_normalisation(faiss: Any, index: Any) -> Any:
    chain = index.chain
    steps = [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
    if len(steps) != 1 or type(steps[0]).__name__ != "NormalizationTransform" or steps[0].norm != 2:
        names = ", ".join(type(step).__name__ for step in steps)
        raise ValueError(f"an IndexPreTransform with {names}; only one L2 normalisation has a counterpart")
    return faiss.downcast_index(index.index)


def _vectors(faiss: Any, index: Any) -> np.ndarray:
    if not isinstance(index, faiss.IndexFlat):
        raise ValueError(f"vectors in a {type(index).__name__}; they must be in an IndexFlat")
    return faiss.vector_to_array(index.codes).view(np.float32).reshape(index.ntotal, index.d)


def _flat(vectors: np.ndarray, metric: str, ids: np.ndarray | None) -> Flat:
    index = Flat(vectors.shape[1], metric)
    index.add(vectors, ids)
    return index


def _restored(faiss: Any, pq: Any) -> Any:
    """FAISS's product quantizer as ours."""
    from .. import quant

    if pq.nbits > 8:
        raise ValueError(f"a product quantizer of {pq.nbits} bits; at most 8 have a counterpart")
    made = quant.PQ(pq.d, pq.M, pq.nbits)
    books = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    if not np.isfinite(books).all():
        raise ValueError("the product quantizer is not trained, or holds NaN or infinities")
    made._restore({"codebooks": books})
    return made


def _pq(faiss: Any, index: Any, metric: str, ids: Any, refine: Any) -> Codes:
    if not index.is_trained:
        raise ValueError("the IndexPQ is not trained")
    made = Codes(_restored(faiss, index.pq), metric, refine=None if refine is None else "float32")
    codes = faiss.vector_to_array(index.codes).reshape(index.ntotal, index.code_size)
    _fill(made, codes, [np.zeros(len(codes), np.int64)], ids, refine)
    return made


def _ivf(faiss: Any, index: Any, metric: str, ids: Any, refine: Any) -> IVF:
    if not index.is_trained:
        raise ValueError(f"the {type(index).__name__} is not trained")
    coded = isinstance(index, faiss.IndexIVFPQ)
    quantizer = _restored(faiss, index.pq) if coded else None
    made = IVF(
        index.d, index.nlist, quantizer, metric, residual=not coded or bool(index.by_residual),
        refine=None if refine is None else "float32", nprobe=max(1, int(index.nprobe)),
    )  # fmt: skip
    made._set_centroids(index.quantizer.reconstruct_n(0, index.nlist))
    sizes, labels, rows = [], [], []
    lists = index.invlists
    width = index.code_size
    for i in range(index.nlist):
        count = lists.list_size(i)
        sizes.append(count)
        if count:
            labels.append(faiss.rev_swig_ptr(lists.get_ids(i), count).copy())
            rows.append(faiss.rev_swig_ptr(lists.get_codes(i), count * width).reshape(count, width).copy())
    labels_ = np.concatenate([*labels, np.empty(0, np.int64)])
    codes = np.concatenate([*rows, np.empty((0, width), np.uint8)])
    owners = np.repeat(np.arange(index.nlist), sizes)
    order = np.argsort(labels_, kind="stable")  # the order of addition, for sequential ids
    labels_, codes, owners = labels_[order], codes[order], owners[order]
    if (refine is not None or ids is not None) and not np.array_equal(labels_, np.arange(len(labels_))):
        raise ValueError(
            "an inverted file in an IndexRefineFlat or IndexIDMap must number its vectors 0, 1, 2, ..."
        )
    ids = labels_ if ids is None else ids
    _fill(made, codes, [owners], ids, refine)
    return made


def _fill(index: Any, codes: np.ndarray, lists: list[np.ndarray], ids: Any, refine: Any) -> None:
    """Put codes (or float32 rows, as bytes) into the lists of an empty `Codes` or `IVF`."""
    coder, arena, n = index._coder, index._lists, len(codes)
    new = Ids()
    checked = new.check_new(ids, n)
    owners = lists[0]
    values: dict[str, np.ndarray] = {}
    if not n:
        return
    if coder.quantizer is None:
        x = np.ascontiguousarray(codes).view(np.float32)
        if not np.isfinite(x).all():
            raise ValueError("the lists hold vectors with NaN or infinities")
        values = coder.encode(x, None, 0)
    else:
        centers = index._centers()
        terms = coder._terms(codes, None if centers is None else centers[owners])
        values = {"codes": coder._packed(codes)}
        for name, term in zip(("add", "mul"), terms):
            if name in coder.fields:
                values[name] = np.asarray(term, np.float32)[:, None, None]
    arena.append(owners, np.arange(n, dtype=np.int32), values)
    if refine is not None:
        vectors, factor = refine
        if len(vectors) != n:
            raise ValueError(f"{len(vectors)} vectors to refine {n} codes with")
        index._rows["vectors"].room(n)[:] = vectors
        index._rows["vectors"].grow(n)
        index.refine_factor = factor
    new.add(checked, n)
    index._ids = new


# ---- writing (FAISS's Python objects keep what their constructors were given)
def to_faiss(index: Any) -> Any:
    """The same index as an object of FAISS.

    Parameters
    ----------
    index : Flat, PQ, Codes or IVF
        On the CPU; vectors in float32, or codes of `quant.PQ`. Metrics 'l2', 'ip', and 'cosine', which
        becomes inner products behind an L2 normalisation.

    Returns
    -------
    faiss.Index
        IndexFlat, IndexPQ, IndexIVFFlat or IndexIVFPQ; in an IndexRefineFlat where the index keeps vectors,
        in an IndexIDMap2 where ids are not 0, 1, 2, ... (inverted files have ids of their own).

    Raises
    ------
    ImportError
        faiss is not installed.
    ValueError
        A kind, metric or quantizer that has no counterpart.
    """
    faiss = _faiss()
    metrics = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT, "cosine": faiss.METRIC_INNER_PRODUCT}
    if not isinstance(index, (Flat, PQ, Codes, IVF)):
        raise ValueError(f"a {type(index).__name__} cannot be written for FAISS; Flat, PQ, Codes and IVF can")
    if index.metric not in metrics:
        raise ValueError(f"metric {index.metric!r} cannot be written for FAISS; {', '.join(metrics)} can")
    if index.device != "cpu":
        raise ValueError(f"the index is on {index.device}: index.to('cpu') first")
    if not index.is_trained:
        raise ValueError(f"this {type(index).__name__} is not trained: call train(x) first")
    with index._lock.reading():
        made = _export(faiss, index, metrics[index.metric])
    if index.metric != "cosine":
        return made
    return faiss.IndexPreTransform(faiss.NormalizationTransform(index.d, 2.0), made)


def write_faiss(index: Any, path: str | os.PathLike[str]) -> None:
    """Write an index to a file that ``faiss.read_index`` reads; see `to_faiss` for what there is."""
    made = to_faiss(index)
    _faiss().write_index(made, os.fspath(path))


def _export(faiss: Any, index: Any, metric: int) -> Any:
    ids = None if index._ids.are_positions else index._ids.array
    if isinstance(index, Flat):
        made = faiss.IndexFlat(index.d, metric)
        made.add(_unit(index, np.asarray(index._rows["vectors"].view, np.float32)))
        return _with_ids(faiss, made, ids)
    if isinstance(index, PQ):
        quantizer: Any = _as_quantizer(index)
        codes = quantizer.pack(np.ascontiguousarray(index._rows["codes"].view))
        kept = index._rows.get("vectors")
        vectors = None if kept is None else np.asarray(kept.view, np.float32)
        made, factor = _export_pq(faiss, quantizer, codes, metric), 4
    else:
        owners, positions, values = _rows_of(index)
        ivf = isinstance(index, IVF)
        if ivf:
            inside = positions if index.refine is not None or ids is None else ids[positions]
            made = _export_ivf(faiss, index, metric, owners, inside, values)
            ids = ids if index.refine is not None else None  # else the lists have them
        else:
            made = _export_pq(faiss, _need_pq(index), values[np.argsort(positions)], metric)
        vectors = None if index.refine is None else index._vectors_kept(np.arange(index.ntotal))
        factor = index.refine_factor
    if vectors is not None:
        vectors = np.ascontiguousarray(_unit(index, vectors))
        made = faiss.IndexRefineFlat(made, faiss.swig_ptr(vectors))
        made.k_factor = max(1, factor)
    return _with_ids(faiss, made, ids)


def _unit(index: Any, x: np.ndarray) -> np.ndarray:
    return HOST.normalise(x) if index.metric == "cosine" else x


def _with_ids(faiss: Any, made: Any, ids: np.ndarray | None) -> Any:
    if ids is None:
        return made
    count, made.ntotal = made.ntotal, 0  # the constructor takes empty ones only
    outer = faiss.IndexIDMap2(made)
    made.ntotal = count
    faiss.copy_array_to_vector(np.ascontiguousarray(ids), outer.id_map)
    outer.construct_rev_map()
    outer.ntotal = made.ntotal
    return outer


def _as_quantizer(index: PQ) -> Any:
    from .. import quant

    made = quant.PQ(index.d, index.m, index.bits)
    made._restore({"codebooks": np.asarray(index.codebooks)})
    return made


def _need_pq(index: Any) -> Any:
    from .. import quant

    if type(index.quantizer) is not quant.PQ:
        name = index.quantizer if isinstance(index.quantizer, str) else type(index.quantizer).__name__
        raise ValueError(f"codes of {name} cannot be written for FAISS; those of quant.PQ can")
    return index.quantizer


def _rows_of(index: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists, positions and codes (or float32 vectors) of all rows, list after list."""
    arena, coder = index._lists, index._coder
    rows, owners = arena.where()
    positions = rows if arena.positions is None else arena.positions[rows].astype(np.int64)
    if coder.quantizer is None:
        values = arena.take("vectors_in_lists", rows)[:, :, 0].astype(np.float32)
    else:
        _need_pq(index)
        values = coder._codes(arena.take("codes", rows))
    return owners, positions, values


def _export_pq(faiss: Any, quantizer: Any, codes: np.ndarray, metric: int) -> Any:
    made = faiss.IndexPQ(quantizer.d, quantizer.m, quantizer.bits, metric)
    _give_codebooks(faiss, made, quantizer)
    faiss.copy_array_to_vector(np.ascontiguousarray(codes).ravel(), made.codes)
    made.ntotal = len(codes)
    return made


def _give_codebooks(faiss: Any, made: Any, quantizer: Any) -> None:
    books = np.ascontiguousarray(quantizer.codebooks, np.float32)
    faiss.copy_array_to_vector(books.ravel(), made.pq.centroids)
    made.is_trained = True


def _export_ivf(
    faiss: Any, index: IVF, metric: int, owners: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> Any:
    if index.soar:
        raise ValueError("an IVF with soar=True has no counterpart in FAISS")
    coarse = faiss.IndexFlat(index.d, metric)
    coarse.add(np.ascontiguousarray(index.centroids))
    if isinstance(index.quantizer, str):
        made = faiss.IndexIVFFlat(coarse, index.d, index.nlist, metric)
        made.is_trained = True
    else:
        quantizer = _need_pq(index)
        made = faiss.IndexIVFPQ(coarse, index.d, index.nlist, quantizer.m, quantizer.bits, metric)
        made.by_residual = index.residual
        _give_codebooks(faiss, made, quantizer)
        made.precompute_table()
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), made.code_size)
    ends = np.searchsorted(owners, np.arange(index.nlist), side="right")
    start = 0
    for i, end in enumerate(ends):
        if end > start:
            part, numbers = (
                np.ascontiguousarray(raw[start:end]),
                np.ascontiguousarray(ids[start:end], np.int64),
            )
            made.invlists.add_entries(i, int(end - start), faiss.swig_ptr(numbers), faiss.swig_ptr(part))
        start = int(end)
    made.ntotal = len(values)
    made.nprobe = index.nprobe
    return made
