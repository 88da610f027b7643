"""Memories: the banks of a model's layers and the tokens they came from, and what they were cited for."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..compress._table import to_numpy
from ..index import _files
from ..nn._memory_bank import MemoryBank
from ..nn._memory_bank_files import bank_config, bank_of, bank_tensors

_KIND = "model memories"


class Memories:
    """Memories of a language model: a bank for each of its layers, and the tokens.

    `lutra.models.extended_mind.collect_memories` makes them.

    Attributes
    ----------
    banks : dict of int to MemoryBank
        By the numbers of the layers.
    token_ids, documents, positions : Tensor, int64, shape (n,)
        Of each memory: its token, the number of its document (in the order of their collection), and its
        place in it.
    """

    def __init__(self, banks: dict[int, MemoryBank]) -> None:
        self.banks = banks
        self.token_ids = self.documents = self.positions = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all banks."""
        return sum(bank.nbytes for bank in self.banks.values())

    def __repr__(self) -> str:
        count = int(self.documents[-1]) + 1 if len(self) else 0
        return f"Memories({len(self)} tokens of {count} documents, layers {sorted(self.banks)})"

    def add(self, token_ids: Tensor, parts: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Add a document: its tokens, and its keys and values (heads, n, width) by layer. All or nothing."""
        if parts.keys() != self.banks.keys():
            raise ValueError(f"parts has layers {sorted(parts)}, the banks are of {sorted(self.banks)}")
        for layer, both in parts.items():
            if not all(torch.isfinite(a).all() for a in both):
                raise ValueError(f"keys or values of layer {layer} are not finite")
        for layer, (keys, values) in parts.items():
            self.banks[layer].add(keys, values)
        number = int(self.documents[-1]) + 1 if len(self) else 0
        token_ids = token_ids.detach().cpu().to(torch.int64)
        self.token_ids = torch.cat([self.token_ids, token_ids])
        self.documents = torch.cat([self.documents, torch.full_like(token_ids, number)])
        self.positions = torch.cat([self.positions, torch.arange(len(token_ids))])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = [
            _files.Tensor.of_array(name, to_numpy(getattr(self, name)))
            for name in ("token_ids", "documents", "positions")
        ]
        for layer, bank in self.banks.items():
            tensors += bank_tensors(bank, f"{layer}.")
        config = {"banks": {str(layer): bank_config(bank) for layer, bank in self.banks.items()}}
        _files.write(path, tensors, _files.describe(_KIND, config))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = True, device: Any = "cpu") -> Memories:
        """Memories that were saved; mapped, unless ``mmap`` is False. Errors as of `MemoryBank.load`."""
        with open(path, "rb") as opened:
            file = _files.File(path, opened)
            file.expect(_KIND, "Memories")
            configs = file.config.get("banks")
            if not isinstance(configs, dict) or not configs or not all(k.isdigit() for k in configs):
                file.fail("its config names no banks")
            banks = {int(k): bank_of(MemoryBank, file, c, f"{k}.", mmap, device) for k, c in configs.items()}
            memories = cls(banks)
            n = {len(bank) for bank in banks.values()}
            if len(n) != 1:
                file.fail("its banks are of different length")
            for name in ("token_ids", "documents", "positions"):
                array, _ = file.tensor(name, "I64", (n.copy().pop(),), mmap=False)
                setattr(memories, name, torch.from_numpy(array))
        return memories


class Citation(NamedTuple):
    """A memory that was attended to.

    Attributes
    ----------
    memory : int
        Its number.
    document, position, token_id : int
    weight : float
        The attention that it got: the sum over the queries that count, their heads and layers.
    """

    memory: int
    document: int
    position: int
    token_id: int
    weight: float


class Citations:
    """The attention that memories get, summed up.

    Attributes
    ----------
    weights : Tensor, float64, shape (n,)
        Of each memory.
    total : float
        The attention that was given in all, to memories and local keys: queries times heads times layers.
    """

    def __init__(self, memories: Memories, last_only: bool) -> None:
        self.memories, self.last_only = memories, last_only
        self.weights = torch.zeros(len(memories), dtype=torch.float64)
        self.total = 0.0

    def count(self, ids: Tensor, weights: Tensor) -> None:
        """Add what a layer attended to, (batch, heads, tokens, k)."""
        if self.last_only:
            ids, weights = ids[:, :, -1:], weights[:, :, -1:]
        weights = weights.detach().cpu().double().reshape(-1)
        self.weights.index_add_(0, ids.cpu().clamp(min=0).reshape(-1), weights)
        self.total += ids.shape[0] * ids.shape[1] * ids.shape[2]

    @property
    def share(self) -> float:
        """The share of all attention that memories got."""
        return float(self.weights.sum()) / self.total if self.total else 0.0

    def top(self, k: int = 10) -> list[Citation]:
        """The k memories that got most, those that got any; equal ones in the order of their numbers."""
        k = _checks.integer("k", k, 1)
        order = torch.sort(self.weights, descending=True, stable=True).indices[:k]
        m = self.memories
        return [
            Citation(i, int(m.documents[i]), int(m.positions[i]), int(m.token_ids[i]), float(self.weights[i]))
            for i in order.tolist()
            if self.weights[i] > 0
        ]
