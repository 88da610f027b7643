"""MultiVector: documents of many vectors, searched by MaxSim over the candidates of a single-vector index."""

from __future__ import annotations

import copy
import json
from math import gcd
from typing import Any

import numpy as np

from .. import _checks, _filters, scan
from .._arrays import BF16, F16, F32, U8, kind_of
from .._results import Neighbors
from ..address import FDE
from . import _files, _multivector_tune
from ._centroid_interaction import CentroidInteraction
from ._home import HOST, Home, check_ids, deliver, home_of
from ._ids import Ids
from ._progress import Progress
from ._token_store import RESIDUAL, TokenStore
from ._tokens import tokens_of
from .base import KINDS, Index, register
from .blocks import Blocks
from .factory import factory
from .transformed import Transformed

_PART = 1 << 26  # bytes of encodings that are held at a time
_GPU_PART = 1 << 28  # and on a GPU
_LISTS = 1 << 22  # candidates of queries that are named at a time where all documents that pass are
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

    On a GPU (`to`, or where the first documents lie there) tokens and encodings stay there, and so does a
    search: encoding, the search of the index, MaxSim. It waits for nothing where queries are an array of
    three dimensions without a mask, or (tokens, ptr) with both there, unless it carves balls or takes
    candidates from centroids. An index of encodings that is for the CPU (HNSW) keeps the
    whole there.

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

    _needs_kernels = ("maxsim", "fde", "knn")

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
        known = not isinstance(index, Transformed) or "transform" in vars(index)  # a file's comes later
        if known and index.d != encoder.dim:
            raise ValueError(
                f"encodings made with these parameters have {encoder.dim} dimensions, "
                f"the index takes d = {index.d}"
            )
        if index.metric != "ip":
            raise ValueError(f"the index of encodings must have metric 'ip', it has {index.metric!r}")
        if index.ntotal:
            raise ValueError(f"the index holds {index.ntotal} encodings already; give an empty one")
        self.index = index
        self._host_only = self._inner._host_only
        super().__init__(d, "ip")
        self._home = self._inner._home  # known where it was trained before
        self.encoder = encoder
        self._tokens = TokenStore(d, tokens)
        self.candidates = candidates
        self.ball_carving = ball_carving
        self._generator: CentroidInteraction | None = None

    @property
    def _inner(self) -> Index:
        """The index of the encodings, behind its transform."""
        return self.index.index if isinstance(self.index, Transformed) else self.index

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
        with self._changing():
            if self._ids.n:
                raise ValueError(f"this MultiVector holds {self._ids.n} documents; train a new one")
            home = self._settle(tokens)
            self._tokens.train(tokens, **({} if progress is None else {"progress": progress}))
            if hasattr(self.index, "train") and not self.index.is_trained:
                offsets = HOST.bring(ptr)
                count = max(1, min(len(offsets) - 1, (1 << 30) // (4 * self.encoder.dim)))
                some = home.bring(tokens[: int(offsets[count])])
                self.index.train(self.encoder.encode_documents(some, home.bring(ptr[: count + 1])))

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
        offsets = HOST.bring(ptr)
        with self._changing():
            if not self.is_trained:
                raise ValueError("this MultiVector is not trained: call train(documents) first")
            count = len(offsets) - 1
            new = self._ids.check_new(ids, count)
            home = self._settle(tokens)
            tokens = home.bring(tokens)
            self._tokens.put(tokens)
            if new is None:
                new = np.arange(self._ids.next, self._ids.next + count)
            step = max(1, (_PART if home is HOST else _GPU_PART) // (4 * self.encoder.dim))
            before, following = self._ids.n, self._ids.next
            with Progress(count, "encode documents", progress) as bar:
                try:
                    for i in range(0, count, step):
                        some = offsets[i : i + step + 1]
                        part = tokens[int(some[0]) : int(some[-1])]
                        encodings = self.encoder.encode_documents(part, home.bring(some - some[0]))
                        self.index.add(encodings, new[i : i + step])
                        bar.tick(len(some) - 1)
                except BaseException:  # all of the addition or nothing of it
                    self.index.remove_ids(self._ids.array[before:].copy())
                    self._ids.next = following
                    raise
            self._tokens.grow(offsets)
            self._generator = None

    def remove_ids(self, ids: Any) -> int:
        with self._changing():
            before = self._ids.array.copy()
            removed = self.index.remove_ids(ids)
            if removed:
                self._tokens.keep(np.flatnonzero(self._ids.positions(before) >= 0))
                self._generator = None
            return removed

    def reconstruct(self, ids: Any) -> Any:
        """The stored tokens of a document (n, d), float32; a list of them for a list of ids."""
        wanted = check_ids(ids)
        with self._lock.reading():
            positions = self._ids.positions(np.atleast_1d(wanted))
            if (positions < 0).any():
                missing = int(np.atleast_1d(wanted)[(positions < 0).argmax()])
                raise IndexError(f"{missing} is not in the index")
            found = [self._tokens.decode(int(p)) for p in positions]
        return found if wanted.ndim else found[0]

    def _documents(self, x: Any, ptr: Any, mask: Any, look: bool = True) -> tuple[Any, Any]:
        """Tokens (float32, float16, bfloat16) and offsets, where they lie.

        Without ``look`` nothing is read from a GPU where the form allows it.
        """
        tokens, ptr = tokens_of(x if ptr is None else (x, ptr), self.d, mask, look=look)
        kind = kind_of(tokens, "tokens")
        home = home_of(tokens, "tokens")
        if not kind.cuda:  # torch's are viewed
            tokens, ptr = HOST.bring(tokens), HOST.bring(ptr)
        if home.kind.code(tokens) not in (F32, F16, BF16):  # float64, 8-bit integers
            with np.errstate(over="ignore"):  # reported below
                tokens = home.kind.cast(tokens, F32)
        for i in range(0, len(tokens) if look or not kind.cuda else 0, 1 << 20):
            part = home.kind.cast(tokens[i : i + (1 << 20)], F32)
            if not home.all_finite(part):
                fine = HOST.bring(home.xp.isfinite(part)).all(1)
                raise ValueError(f"tokens[{int(fine.argmin()) + i}] holds NaN or infinities")
        return tokens, ptr

    # ---- where it lives
    def _lacking(self, home: Home) -> list[str]:
        return super()._lacking(home) + self._inner._lacking(home)

    def _move(self, home: Home) -> None:
        inner, before = self._inner, self._tokens.home
        if not (home.kind.cuda and self._lacking(home)):  # else it is said below what is lacking
            self._tokens.to(home)
            try:
                with inner._changing():
                    inner._move(home)
            except BaseException:
                self._tokens.to(before)
                raise
        super()._move(home)
        self._generator = None

    def _why_host(self, device: Any) -> str:
        return (
            f"this MultiVector keeps its encodings in {type(self._inner).__name__}, which is for the CPU, "
            f"so it cannot move to {device!r}; with 'float16', 'int8', 'pq', Flat, IVF, PQ or Codes it can"
        )

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
        tokens, ptr = self._documents(q, ptr, mask, look=False)
        k = _checks.integer("k", k, 1)
        _checks.choice("generator", generator, {"encodings": 0, "centroids": 1, "all": 2})
        candidates = self.candidates if candidates is None else _checks.integer("candidates", candidates, 1)
        with self._lock.reading():
            if not self._ids.n:
                self._nothing()
            home = self._home or HOST
            with home.following(tokens):
                tokens, ptr = home.bring(tokens), home.bring(ptr)
                found = self._find(home, tokens, ptr, k, filter, max(k, candidates), generator)
                return Neighbors(*(map(HOST.bring, found) if like is None else deliver(home, found, like)))

    def _find(
        self, home: Home, tokens: Any, ptr: Any, k: int, filter: Any, wanted: int, generator: str
    ) -> tuple[Any, Any]:
        if generator == "all" or wanted >= self._ids.n:
            return self._exact(home, tokens, ptr, k, filter)
        if generator == "centroids":
            keep = None if filter is None else self._keep(home, filter)
            positions = self._centroid_interaction().candidates(tokens, ptr, wanted, keep)
        else:
            positions = self._candidates_of(home, tokens, ptr, wanted, filter)
        return self._rank(home, tokens, ptr, k, positions)

    def _rank(self, home: Home, tokens: Any, ptr: Any, k: int, positions: Any) -> tuple[Any, Any]:
        """The k best of some positions (nq, count), or of all documents, by MaxSim."""
        store = self._tokens
        found = scan.maxsim(
            tokens, ptr, store.docs, store.offsets, candidates=positions, k=k, **store.options
        )
        return found.scores, self._ids.of(home, found.ids)

    def _exact(self, home: Home, tokens: Any, ptr: Any, k: int, filter: Any) -> tuple[Any, Any]:
        if filter is None:
            return self._rank(home, tokens, ptr, k, None)
        keep = self._keep(home, filter)
        if home is not HOST:
            return self._exact_on_gpu(home, tokens, ptr, k, keep)
        allowed, offsets = _filters.positions(keep, self._ids.n), HOST.bring(ptr)
        step = max(1, _LISTS // max(1, len(allowed)))  # queries whose lists are made at a time
        found = []
        for i in range(0, max(1, len(offsets) - 1), step):
            some = offsets[i : i + step + 1]
            lists = home.positions(np.tile(allowed, (len(some) - 1, 1)))
            part = tokens[int(some[0]) : int(some[-1])]
            found.append(self._rank(home, part, home.positions(some - some[0]), k, lists))
        return tuple(home.xp.concatenate(parts) for parts in zip(*found))

    def _exact_on_gpu(self, home: Home, tokens: Any, ptr: Any, k: int, keep: Any) -> tuple[Any, Any]:
        """All documents are named, and nothing where one does not pass: how many do is not known here."""
        every, nq = home.arange(self._ids.n), int(ptr.shape[0]) - 1
        passes = (keep[every >> 3] >> home.kind.cast(every & 7, U8)) & 1
        named = home.xp.where(passes > 0, every, -1)[None]
        step = max(1, _LISTS // self._ids.n)  # queries whose lists are made at a time
        found = []
        for i in range(0, max(1, nq), step):
            some = ptr[i : i + step + 1]  # of all tokens
            lists = home.xp.broadcast_to(named, (int(some.shape[0]) - 1, self._ids.n))
            found.append(self._rank(home, tokens, some, k, lists))
        return tuple(home.xp.concatenate(parts) for parts in zip(*found))

    def _candidates_of(self, home: Home, tokens: Any, ptr: Any, count: int, filter: Any) -> Any:
        """Positions (nq, count) by the encodings, rising, -1 where there are fewer."""
        if self.ball_carving is not None:
            from ..address import ball_carving

            tokens, ptr = ball_carving(tokens, ptr, self.ball_carving)
        if home is HOST and isinstance(self.index, Blocks):
            rows = self.encoder.encode_queries(tokens, ptr, sparse=True)
            ids = self.index.search_blocks(rows, count, filter=filter).ids
        else:
            ids = self.index.search(self.encoder.encode_queries(tokens, ptr), count, filter=filter).ids
        # In the order of addition: the tokens lie in that order, and ties go to the lower position.
        return home.sort(home.xp.where(ids < 0, -1, self._ids.places(home, ids)))

    def _centroid_interaction(self) -> CentroidInteraction:
        if self._tokens.format not in RESIDUAL:
            raise ValueError(
                "generator='centroids' needs tokens with centroids: tokens='residual2' (or 1, 4, 8)"
            )
        if self._generator is None:
            store = self._tokens
            self._generator = CentroidInteraction(store.home, store.docs, store.ptr)
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
        home = self._home or HOST
        tokens, ptr = home.bring(tokens), home.bring(ptr)
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
        if self.index.d != self.encoder.dim:
            file.fail(f"encodings have {self.encoder.dim} dimensions, their index takes {self.index.d}")
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
