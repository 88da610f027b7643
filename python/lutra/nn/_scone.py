"""SconeEmbedding: embeddings of tokens, and of the frequent n-grams that end at them, from host memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _checks
from ..address import longest_match
from ..compress._table import to_numpy
from ..index import _files
from ..index._progress import Progress
from ..vocab import FGrams
from ._embedding import Embedding
from ._embedding_ops import ops
from ._host import HostEmbedding

_COMBINE = {"replace": 0, "add": 1}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class SconeEmbedding(nn.Module):
    """Embeddings of tokens and of the longest frequent n-gram that ends at each (SCONE).

    Where an n-gram of ``fgrams`` ends at a token (`lutra.address.longest_match`), its row takes the place of
    the token's, or is added to it. These rows stay in host memory or in a mapped file, however many there
    are; the tokens' own are a parameter as usual.

    Parameters
    ----------
    num_embeddings, embedding_dim, padding_idx
        Of the tokens, as in ``torch.nn.Embedding``.
    fgrams : lutra.vocab.FGrams
    combine : {'replace', 'add'}, default 'replace'
        ``'replace'`` is the paper's.
    path : path, optional
        A safetensors file of (len(fgrams), embedding_dim), mapped and not trained: what `build_table` writes.
        Without it, and without ``model``, the rows are a table in host memory that is trained by itself.
    name : str, optional
        The tensor in the file.
    model : Module, optional
        Computes the rows while training, from tokens (n-grams, length), all of one length, to (n-grams, dim),
        or to (n-grams, length, dim), of which the last is taken. `offload` then puts them into a file.
    sparse : bool, default True
        The gradient of a table in memory holds the rows touched only.
    device, dtype
        Of the tokens' embeddings.

    Attributes
    ----------
    tokens : lutra.nn.Embedding
    memory : lutra.nn.HostEmbedding, or None with ``model``
        Its table is trained by name: ``lutra.optim.Adagrad([layer.memory.table])``.

    Raises
    ------
    TypeError, ValueError
        No FGrams, or a file of another shape.

    Notes
    -----
    ``state_dict`` holds the tokens' embeddings and a table in memory; a file is named by ``path``, the
    n-grams by ``fgrams``. `prefetch` matches the next batch and reads its rows in a thread of its own.

    References
    ----------
    Yu, Cohen, Ghazi, Huang, Kamath, Kumar, Liu, Zhang, Scaling Embedding Layers in Language Models (SCONE),
    arXiv 2502.01637.

    Examples
    --------
    >>> import torch, lutra
    >>> fgrams = lutra.vocab.FGrams([(5, 6), (5, 6, 7)])
    >>> layer = lutra.nn.SconeEmbedding(10, 4, fgrams)
    >>> bool((layer(torch.tensor([[5, 6, 7]]))[0, 2] == layer.memory.table[1]).all())
    True
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, fgrams: FGrams, padding_idx: int | None = None, *,
        combine: str = "replace", path: str | os.PathLike[str] | None = None, name: str | None = None,
        model: nn.Module | None = None, sparse: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(fgrams, FGrams):
            raise TypeError(f"fgrams must be a lutra.vocab.FGrams, got {type(fgrams).__qualname__}")
        _checks.choice("combine", combine, _COMBINE)
        if model is not None and path is not None:
            raise ValueError("give a model, which computes the rows, or a path, where they are; not both")
        self.fgrams, self.combine = fgrams, combine
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.tokens = Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.model = model
        self.memory: HostEmbedding | None = None
        if model is None:
            self.memory = HostEmbedding(
                len(fgrams), embedding_dim, path=path, name=name, sparse=sparse, device=device, dtype=dtype
            )
        self._next: tuple[Tensor, Future] | None = None
        self._threads: ThreadPoolExecutor | None = None

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.fgrams}, combine={self.combine!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": None, "_threads": None}

    # ---------------------------------------------------------------- computing
    def forward(self, input: Tensor) -> Tensor:
        """The embeddings, (\\*input.shape, embedding_dim); the last axis of input is a sequence."""
        own = self.tokens(input)
        if torch.compiler.is_compiling():
            return self._traced(input, own)
        ids, hits, rows = self._take(input)
        if rows is None:
            rows = self._rows(ids[hits])
        if not len(rows):
            return own
        index = hits.reshape(-1).nonzero()[:, 0].to(own.device)
        flat, rows = own.reshape(-1, self.embedding_dim), rows.to(own.device, own.dtype)
        if self.combine == "add":
            return flat.index_add(0, index, rows).reshape(own.shape)
        return flat.index_copy(0, index, rows).reshape(own.shape)

    def _traced(self, input: Tensor, own: Tensor) -> Tensor:
        """Without shapes that depend on data, for torch.compile."""
        if self.memory is None:
            raise RuntimeError("an f-gram model is not compiled with the layer: compile it, or offload first")
        ids, _ = longest_match(input.cpu(), self.fgrams)
        rows = ops.embedding(self.memory.table, ids.clamp(min=0), None, self.memory.sparse)
        rows, hits = rows.to(own.device, own.dtype), (ids >= 0).to(own.device)[..., None]
        if self.combine == "add":
            return own + rows * hits
        return torch.where(hits, rows, own)

    def _rows(self, ids: Tensor) -> Tensor:
        """The rows of ids of n-grams, (n,) on the host."""
        if self.memory is not None:
            return self.memory(ids)
        unique, inverse = torch.unique(ids, return_inverse=True)
        assert self.model is not None
        rows = _embed(self.model, self.fgrams.array[unique.numpy()], self.tokens.weight.device)
        return rows[inverse.to(rows.device)] if len(ids) else rows.new_empty((0, self.embedding_dim))

    def _take(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids and where there is one, and the rows if a prefetch has read them."""
        if self._next is not None:
            expected, future = self._next
            if expected is input or torch.equal(expected, input):
                self._next = None
                return future.result()
        return self._match(input)

    def _match(self, input: Tensor) -> tuple[Tensor, Tensor, None]:
        ids = longest_match(input.cpu(), self.fgrams).ids
        return ids, ids >= 0, None

    def prefetch(self, input: Tensor) -> None:
        """Begin to match the batch that comes next, and to read its rows, while this one is computed.

        The next `forward` takes the result if its input is the same, otherwise it has no effect. Rows are
        read ahead where the table is not trained (a file, or under ``torch.no_grad``); otherwise the matches
        are.
        """
        frozen = self.memory is not None and not (self.memory.table.requires_grad and torch.is_grad_enabled())

        def work() -> tuple[Tensor, Tensor, Tensor | None]:
            ids, hits, _ = self._match(input)
            if not frozen:
                return ids, hits, None
            with torch.no_grad():
                return ids, hits, self._rows(ids[hits])

        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "lutra-scone")
        self._next = input, self._threads.submit(work)

    # ---------------------------------------------------------------- the table
    def offload(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the rows that ``model`` computes (see `build_table`), and use the file from now on."""
        if self.model is None:
            raise ValueError("the layer has no model: its rows are a table already")
        self.build_table(self.model, self.fgrams, path, **{"device": self.tokens.weight.device, **options})
        weight = self.tokens.weight
        memory = HostEmbedding(
            len(self.fgrams), self.embedding_dim, path=path, device=weight.device, dtype=weight.dtype
        )
        self.memory, self.model = memory, None

    @staticmethod
    def build_table(
        model: Callable[[Tensor], Tensor], fgrams: FGrams, path: str | os.PathLike[str], *,
        batch_size: int = 4096, dtype: torch.dtype = torch.float16, device: Any = None,
        progress: bool | None = None,
    ) -> None:  # fmt: skip
        """Run a model over all n-grams and write its embeddings to a file, for ``path``.

        Parameters
        ----------
        model : Module or function
            From tokens (n-grams, length), int64, all of one length, to (n-grams, dim), or to (n-grams,
            length, dim), of which the last is taken. A module runs in eval mode.
        fgrams : lutra.vocab.FGrams
        path : path
            A safetensors file, written whole or not at all.
        batch_size : int, default 4096
            N-grams at a time; memory does not depend on their number.
        dtype : float16 (default), float32 or bfloat16
        device
            Where the tokens are sent; default the CPU.
        progress : bool, optional
            None shows a bar after two seconds on a terminal, True at once, False never.

        Raises
        ------
        ValueError
            The model gives another shape, or numbers that are not finite in ``dtype``.
        """
        batch_size = _checks.integer("batch_size", batch_size, 1)
        if dtype not in _NAMES:
            raise TypeError(f"dtype must be float16, float32 or bfloat16, got {dtype}")
        training = getattr(model, "training", False)
        try:
            if isinstance(model, nn.Module):
                model.eval()
            with torch.no_grad():
                width = _embed(model, fgrams.array[:1], device).shape[1]

                def parts() -> Iterator[np.ndarray]:
                    with Progress(len(fgrams), "f-grams", progress) as bar:
                        for begin in range(0, len(fgrams), batch_size):
                            rows = _embed(model, fgrams.array[begin : begin + batch_size], device).to(dtype)
                            if rows.shape[1] != width:
                                raise ValueError(f"model gave rows of {width} and of {rows.shape[1]} numbers")
                            bad = ~torch.isfinite(rows).all(1)
                            if bad.any():
                                at = begin + int(bad.int().argmax())
                                raise ValueError(f"model's row of {fgrams[at]} is not finite in {dtype}")
                            yield to_numpy(rows)
                            bar.tick(len(rows))

                tensor = _files.Tensor("weight", _NAMES[dtype], (len(fgrams), width), parts)
                _files.write(path, [tensor], {"format": "pt"})
        finally:
            if isinstance(model, nn.Module):
                model.train(training)


def _embed(model: Callable[[Tensor], Tensor], ngrams: np.ndarray, device: Any) -> Tensor:
    """The model's rows of n-grams (n, longest), which it gets by length."""
    lengths = (ngrams >= 0).sum(1)
    parts, order = [], []
    for n in np.unique(lengths).tolist():
        where = np.flatnonzero(lengths == n)
        tokens = torch.from_numpy(ngrams[where, :n].astype(np.int64)).to(device)
        rows = model(tokens)
        if not isinstance(rows, Tensor) or rows.dim() not in (2, 3) or rows.shape[:-1] not in (
            (len(where),), (len(where), n),
        ):  # fmt: skip
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__qualname__
            raise ValueError(
                f"model gave {got} for tokens {tuple(tokens.shape)}; it must give (n-grams, dim)"
            )
        parts.append(rows[:, -1] if rows.dim() == 3 else rows)
        order.append(where)
    if not parts:
        raise ValueError("there are no n-grams to embed")
    place = torch.from_numpy(np.argsort(np.concatenate(order))).to(parts[0].device)
    return torch.cat(parts)[place]
