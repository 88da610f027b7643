"""MultiVector: documents of many vectors, searched by MaxSim over the candidates of a single-vector index."""

from __future__ import annotations

import copy
import json
from math import gcd
from typing import Any

import numpy as np

from .. import _checks, _filters, scan
from .._results import Neighbors
from ..address import FDE
from . import _files, _multivector_tune
from ._centroid_interaction import CentroidInteraction
from ._home import HOST, deliver
from ._ids import Ids
from ._progress import Progress
from ._token_store import RESIDUAL, TokenStore
from ._tokens import as_tokens
from .base import KINDS, Index, register
from .blocks import Blocks
from .factory import factory

_PART = 1 << 26  # bytes of encodings that are held at a time
_OWN = ("n", "next_id", "trained")


@register
class MultiVector(Index):
    """Documents that are sets of vectors (a ColBERT model's tokens), ranked by MaxSim.

    MUVERA (Dhulipala et al. 2024): each document becomes one fixed dimensional encoding, whose inner product
    with a query's approximates MaxSim. A single-vector index of these finds ``candidates`` documents for a
    query; MaxSim over their stored tokens ranks them.

    Parameters
    ----------
    d : int
        Dimension of the token vectors.
    index : str or Index, default 'float16'
        What holds the encodings: 'float32', 'float16', 'bfloat16', 'int8' or 'pq' (256 centroids for 8
        dimensions, as in the paper; needs training), all scanned over a query's non-zero blocks only; else an
        empty index of ``encoder.dim`` dimensions and metric 'ip', or a text for `lutra.index.factory`.
    tokens : str, default 'float16'
        How tokens are kept: 'float32', 'float16', 'bfloat16', 'int8' (with a scale each), or 'residual1',
        'residual2', 'residual4', 'residual8' (a centroid and so many bits a dimension; need training).
    encoder : FDE, optional
        Default ``FDE(d, repetitions, k_sim, d_proj, seed=seed)``.
    repetitions, k_sim, d_proj, seed
        Of the default encoder, see `lutra.address.FDE`.
    candidates : int, default 200
        Documents that are ranked by MaxSim for each query, at least k. `tune` sets it.
    ball_carving : float, optional
        Query tokens with at least this inner product are clustered before they are encoded (the paper: 0.7),
        so that fewer blocks are scanned. Ranking uses all tokens.

    Attributes
    ----------
    index : Index
        Of the encodings, with the same ids.
    candidates, ball_carving
        May be set at any time.

    Notes
    -----
    Memory: the encodings (``encoder.dim`` values each) and the tokens (``d`` values each); both mapped when
    the index is loaded. Cost of a query: the scan of the encodings' blocks that the query has, and
    ``candidates`` MaxSim products.

    References
    ----------
    Dhulipala, Hadian, Jayaram, Lee, Mirrokni, MUVERA: multi-vector retrieval via fixed dimensional encodings,
    2024, arXiv 2405.19504. Santhanam et al., PLAID, 2022, arXiv 2205.09707, for residual codes.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> rng = np.random.default_rng(0)
    >>> documents = [rng.standard_normal((n, 16), dtype=np.float32) for n in (5, 8, 3)]
    >>> index = lutra.index.MultiVector(16)
    >>> index.add(documents)
    >>> index.search([documents[1][:3]], k=1).ids
    array([[1]])
    """

    _host_only = True

    def __init__(
        self,
        d: int,
        index: Any = "float16",
        tokens: str = "float16",
        *,
        encoder: FDE | None = None,
        repetitions: int = 20,
        k_sim: int = 5,
        d_proj: int = 16,
        seed: int = 0,
        candidates: int = 200,
        ball_carving: float | None = None,
    ) -> None:
        d = _checks.integer("d", d, 1)
        if encoder is None:
            encoder = FDE(d, repetitions, k_sim, min(d, 16) if d_proj == 16 else d_proj, seed=seed)
        if not isinstance(encoder, FDE):
            raise TypeError(f"encoder must be a lutra.address.FDE, got {encoder!r}")
        if encoder.d != d:
            raise ValueError(f"the encoder takes tokens of {encoder.d} dimensions, the index has d = {d}")
        if isinstance(index, str):
            index = _inner(index, encoder)
        if not isinstance(index, Index) or isinstance(index, MultiVector):
            raise TypeError(f"index must be a text or a single-vector lutra index, got {index!r}")
        if index.d != encoder.dim:
            raise ValueError(
                f"encodings made with these parameters have {encoder.dim} dimensions, "
                f"the index takes d = {index.d}"
            )
        if index.metric != "ip":
            raise ValueError(f"the index of encodings must have metric 'ip', it has {index.metric!r}")
        if index.ntotal:
            raise ValueError(f"the index holds {index.ntotal} encodings already; give an empty one")
        self.index = index
        super().__init__(d, "ip")
        self.encoder = encoder
        self._tokens = TokenStore(d, tokens)
        self.candidates = candidates
        self.ball_carving = ball_carving
        self._generator: CentroidInteraction | None = None

    # The ids are those of the encodings.
    @property
    def _ids(self) -> Ids:
        return self.index._ids

    @_ids.setter
    def _ids(self, ids: Ids) -> None:
        self.index._ids = ids

    @property
    def candidates(self) -> int:
        """Documents that are ranked by MaxSim for each query."""
        return self._candidates

    @candidates.setter
    def candidates(self, value: int) -> None:
        self._candidates = _checks.integer("candidates", value, 1)

    @property
    def ball_carving(self) -> float | None:
        """Inner product from which query tokens are clustered before they are encoded; None: never."""
        return self._ball_carving

    @ball_carving.setter
    def ball_carving(self, value: float | None) -> None:
        self._ball_carving = None if value is None else _checks.positive("ball_carving", value)

    @property
    def tokens(self) -> str:
        """How tokens are kept."""
        return self._tokens.format

    @property
    def ntokens(self) -> int:
        """Number of stored token vectors."""
        return self._tokens.ntokens

    @property
    def is_trained(self) -> bool:
        return self.index.is_trained and self._tokens.is_trained

    @property
    def nbytes(self) -> int:
        """Bytes of the encodings, the tokens and the ids, without room to grow."""
        return self.index.nbytes + self._tokens.nbytes

    # ---- building
    def train(self, x: Any, *, ptr: Any = None, mask: Any = None, progress: bool | None = None) -> None:
        """Learn what compressed encodings and residual tokens need, from a sample of documents.

        Parameters
        ----------
        x, ptr, mask
            Documents, as for `add`. A few thousand suffice: 256 encodings and more for 'pq'.
        progress : bool, optional
            A progress bar; default on a terminal, for long work.

        Raises
        ------
        ValueError
            The index holds documents, or what the parts refuse.
        """
        tokens, ptr = self._documents(x, ptr, mask)
        with self._lock.writing():
            if self._ids.n:
                raise ValueError(f"this MultiVector holds {self._ids.n} documents; train a new one")
            self._tokens.train(tokens, **({} if progress is None else {"progress": progress}))
            if hasattr(self.index, "train") and not self.index.is_trained:
                count = max(1, min(len(ptr) - 1, (1 << 30) // (4 * self.encoder.dim)))
                some = ptr[: count + 1]
                self.index.train(self.encoder.encode_documents(tokens[: some[-1]], some))

    def add(
        self, x: Any, ids: Any = None, *, ptr: Any = None, mask: Any = None, progress: bool | None = None
    ) -> None:
        """Add documents.

        Parameters
        ----------
        x : list of arrays (n_i, d); array (documents, length, d); or array (tokens, d) with ``ptr``
            What ``encode`` of pylate or of sentence-transformers' multi-vector models returns, or tokens one
            after another.
        ids : array or list of int, shape (documents,), optional
            As in `Flat.add`.
        ptr : array, shape (documents + 1,), int64, optional
            Where each document begins, and the end. ``(tokens, ptr)`` may be given as ``x``, too.
        mask : array, shape (documents, length), bool, optional
            With a padded ``x``: which tokens there are.
        progress : bool, optional
            A progress bar; default on a terminal, for long work.

        Raises
        ------
        TypeError, ValueError
            Input that does not fit together, NaN or infinities, ids that are taken, an index that is not
            trained. The index is then unchanged.
        """
        tokens, ptr = self._documents(x, ptr, mask)
        with self._lock.writing():
            if not self.is_trained:
                raise ValueError("this MultiVector is not trained: call train(documents) first")
            count = len(ptr) - 1
            new = self._ids.check_new(ids, count)
            self._tokens.put(tokens, ptr)
            if new is None:
                new = np.arange(self._ids.next, self._ids.next + count)
            step = max(1, _PART // (4 * self.encoder.dim))
            before, following = self._ids.n, self._ids.next
            with Progress(count, "encode documents", progress) as bar:
                try:
                    for i in range(0, count, step):
                        some = ptr[i : i + step + 1]
                        part = tokens[some[0] : some[-1]]
                        encodings = self.encoder.encode_documents(part, some - some[0])
                        self.index.add(encodings, new[i : i + step])
                        bar.tick(len(some) - 1)
                except BaseException:  # all of the addition or nothing of it
                    self.index.remove_ids(self._ids.array[before:].copy())
                    self._ids.next = following
                    raise
            self._tokens.grow(ptr)
            self._generator = None

    def remove_ids(self, ids: Any) -> int:
        with self._lock.writing():
            before = self._ids.array.copy()
            removed = self.index.remove_ids(ids)
            if removed:
                self._tokens.keep(np.flatnonzero(self._ids.positions(before) >= 0))
                self._generator = None
            return removed

    def reconstruct(self, ids: Any) -> Any:
        """The stored tokens of a document (n, d), float32; a list of them for a list of ids."""
        wanted = np.asarray(ids)
        if wanted.dtype.kind not in "iu" or wanted.ndim > 1:
            raise TypeError("ids must be an int, or a list or array of int")
        with self._lock.reading():
            positions = self._ids.positions(np.atleast_1d(wanted).astype(np.int64))
            if (positions < 0).any():
                missing = int(np.atleast_1d(wanted)[(positions < 0).argmax()])
                raise IndexError(f"{missing} is not in the index")
            found = [self._tokens.decode(int(p)) for p in positions]
        return found if wanted.ndim else found[0]

    def _documents(self, x: Any, ptr: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens, ptr = as_tokens(x if ptr is None else (x, ptr), self.d, mask)
        tokens = HOST.bring(tokens)
        if tokens.dtype.name not in ("float32", "float16", "bfloat16"):  # float64, 8-bit integers
            with np.errstate(over="ignore"):  # reported below
                tokens = tokens.astype(np.float32)
        for i in range(0, len(tokens), 1 << 20):
            fine = np.isfinite(np.asarray(tokens[i : i + (1 << 20)], np.float32)).all(1)
            if not fine.all():
                raise ValueError(f"tokens[{int(fine.argmin()) + i}] holds NaN or infinities")
        return tokens, np.asarray(HOST.bring(ptr), np.int64)

    # ---- searching
    def search(
        self,
        q: Any,
        k: int = 10,
        *,
        ptr: Any = None,
        mask: Any = None,
        filter: Any = None,
        candidates: int | None = None,
        generator: str = "encodings",
    ) -> Neighbors:
        """The k best documents for each query, by MaxSim among its candidates.

        Parameters
        ----------
        q, ptr, mask
            Queries, in the forms that `add` takes documents in.
        k : int, default 10
            May exceed the number of documents.
        filter : optional
            Which ids may be found, as for `Flat.search`.
        candidates : int, optional
            In place of the attribute. From the number of documents on, all are ranked and nothing is encoded.
        generator : {'encodings', 'centroids', 'all'}, default 'encodings'
            Where candidates come from: the encodings; centroid interaction, as in PLAID (residual tokens
            only); or all documents, an exact search.

        Returns
        -------
        scores : array, shape (nq, k), float32
            MaxSim, best first; -inf where there is no document.
        ids : array, shape (nq, k), int64
            -1 where there is no document. Among equal scores the document that was added first.

        Raises
        ------
        TypeError, ValueError
            Input that does not fit, NaN, k < 1, an index that is empty or not trained.
        """
        like = _first_array(q)
        tokens, ptr = self._documents(q, ptr, mask)
        k = _checks.integer("k", k, 1)
        _checks.choice("generator", generator, {"encodings": 0, "centroids": 1, "all": 2})
        candidates = self.candidates if candidates is None else _checks.integer("candidates", candidates, 1)
        wanted = max(k, candidates)
        with self._lock.reading():
            n = self._ids.n
            if not n:
                self._nothing()
            if generator == "all" or wanted >= n:
                found = self._exact(tokens, ptr, k, filter)
                return found if like is None else Neighbors(*deliver(HOST, found, like))
            if generator == "centroids":
                keep = None if filter is None else self._keep(HOST, filter)
                positions = self._centroid_interaction().candidates(tokens, ptr, wanted, keep)
            else:
                positions = self._candidates_of(tokens, ptr, wanted, filter)
            found = self._rank(tokens, ptr, k, positions)
            return found if like is None else Neighbors(*deliver(HOST, found, like))

    def _rank(self, tokens: np.ndarray, ptr: np.ndarray, k: int, positions: np.ndarray | None) -> Neighbors:
        """The k best of some positions (nq, count), or of all documents, by MaxSim."""
        store = self._tokens
        found = scan.maxsim(tokens, ptr, store.docs, store.ptr, candidates=positions, k=k, **store.options)
        return Neighbors(found.scores, self._ids.of(HOST, found.ids))

    def _exact(self, tokens: np.ndarray, ptr: np.ndarray, k: int, filter: Any) -> Neighbors:
        keep = None if filter is None else self._keep(HOST, filter)
        if keep is None:
            return self._rank(tokens, ptr, k, None)
        allowed = _filters.positions(keep, self._ids.n)
        step = max(1, (1 << 22) // max(1, len(allowed)))  # queries whose lists are made at a time
        found = []
        for i in range(0, max(1, len(ptr) - 1), step):
            some = ptr[i : i + step + 1]
            lists = np.tile(allowed, (len(some) - 1, 1))
            found.append(self._rank(tokens[some[0] : some[-1]], some - some[0], k, lists))
        return Neighbors(*(np.concatenate(parts) for parts in zip(*found)))

    def _candidates_of(self, tokens: np.ndarray, ptr: np.ndarray, count: int, filter: Any) -> np.ndarray:
        """Positions (nq, count) by the encodings, rising, -1 where there are fewer."""
        if self.ball_carving is not None:
            from ..address import ball_carving

            tokens, ptr = ball_carving(tokens, ptr, self.ball_carving)
        if isinstance(self.index, Blocks):
            rows = self.encoder.encode_queries(tokens, ptr, sparse=True)
            ids = self.index.search_blocks(rows, count, filter=filter).ids
        else:
            ids = self.index.search(self.encoder.encode_queries(tokens, ptr), count, filter=filter).ids
        # In the order of addition: the tokens lie in that order, and ties go to the lower position.
        return np.sort(np.where(ids < 0, -1, self._ids.positions(ids)), 1)

    def _centroid_interaction(self) -> CentroidInteraction:
        if self._tokens.format not in RESIDUAL:
            raise ValueError(
                "generator='centroids' needs tokens with centroids: tokens='residual2' (or 1, 4, 8)"
            )
        if self._generator is None:
            self._generator = CentroidInteraction(self._tokens.docs, self._tokens.ptr)
        return self._generator

    def tune(  # type: ignore[override]
        self, queries: Any, recall: float = 0.95, k: int = 10, *, ptr: Any = None, mask: Any = None
    ) -> Any:
        """Set the fastest search parameters that reach a recall of the exact MaxSim search.

        Parameters
        ----------
        queries, ptr, mask
            As for `search`; a hundred and more, like those to come.
        recall : float, default 0.95
            Mean share of the exact k best that must be found.
        k : int, default 10

        Returns
        -------
        lutra.index.Tuned
            With ``candidates``, and ``nprobe`` or ``ef_search`` where the index of the encodings has them.

        Warns
        -----
        UserWarning
            The recall is out of reach; the setting with the highest is then set.

        Notes
        -----
        Costs an exact search of the queries. What residual or 8-bit tokens change in the scores is not seen
        here: the exact search ranks by the stored tokens.
        """
        tokens, ptr = self._documents(queries, ptr, mask)
        return _multivector_tune.tune(self, tokens, ptr, recall, k)

    # ---- files
    def _config(self) -> dict[str, Any]:
        inside = json.loads(self.index._contents()[1]["config"])
        return {
            "d": self.d,
            "tokens": self._tokens.format,
            "encoder": self.encoder.config(),
            "candidates": self.candidates,
            "ball_carving": self.ball_carving,
            "token_config": self._tokens.config(),
            "index": {"kind": type(self.index).__name__, "config": inside},
        }

    def __repr__(self) -> str:
        state = "" if self.is_trained else ", not trained"
        return (
            f"MultiVector(d={self.d}, ntotal={self.ntotal}, ntokens={self.ntokens}, "
            f"tokens={self._tokens.format!r}, encoder={self.encoder!r}, candidates={self.candidates}, "
            f"index={self.index!r}{state})"
        )

    def _contents(self):
        tensors = [*self.index._contents()[0], *self._tokens.tensors()]
        config = {**self._config(), "n": self.ntotal, "next_id": self._ids.next, "trained": self.is_trained}
        return tensors, _files.describe("MultiVector", config)

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> Index:
        inner = config["index"]
        if inner["kind"] == cls.__name__:
            raise ValueError("a MultiVector in a MultiVector")
        arguments = {name: value for name, value in inner["config"].items() if name not in _OWN}
        return cls(
            config["d"],
            KINDS[inner["kind"]]._from_config(arguments),
            config["tokens"],
            encoder=FDE(**config["encoder"]),
            candidates=config["candidates"],
            ball_carving=config["ball_carving"],
        )

    def _restore(self, file: _files.File, n: int, mmap: bool) -> None:
        inside = copy.copy(file)  # the same file, read with the configuration of the index
        inside.config = file.config["index"]["config"]
        self.index._restore(inside, n, mmap)
        self.index._home = HOST
        tokens = file.config.get("token_config")
        self._tokens.restore(file, n, tokens if isinstance(tokens, dict) else {}, mmap)


def _first_array(q: Any) -> Any:
    """An array of the caller's library: the input or its first part."""
    while isinstance(q, (list, tuple)) and len(q):
        q = q[0]
    return q if hasattr(q, "__dlpack__") else None


def _inner(text: str, encoder: FDE) -> Index:
    if text in ("float32", "float16", "bfloat16", "int8", "pq"):
        if encoder.final_dim is None:
            return Blocks(encoder.dim, encoder.width, text, dsub=gcd(8, encoder.width))
        # the last sketch mixes the blocks: nothing of a query is zero
        code = {"float32": "Flat", "float16": "SQfp16", "bfloat16": "SQbf16", "int8": "SQ8"}
        return factory(code.get(text, f"PQ{encoder.dim // 8}"), encoder.dim, "ip")
    return factory(text, encoder.dim, "ip")
