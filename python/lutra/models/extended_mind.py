"""Extended Mind: memories for decoders of Hugging Face transformers, without training.

Importing this module registers the attention implementation "lutra_memory".

Klett and Ahle, Extended Mind Transformers, 2024, arXiv 2406.02332.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .. import _checks
from ..nn import MemoryBank
from ._collect import collect_memories
from ._memories import Citation, Citations, Memories
from ._memory_layers import NAME, STATE, Reader, attention_layers

__all__ = ["Citation", "Citations", "ExtendedMind", "Memories", "attach_memories", "collect_memories"]


class ExtendedMind:
    """A model with memories attached, see `attach_memories`; as a context it detaches them at the end."""

    def __init__(
        self, model: Any, memories: Memories, top_k: int, similarity_threshold: float | None
    ) -> None:
        self.model, self.memories = model, memories
        self.top_k = _checks.integer("top_k", top_k, 1)
        self.similarity_threshold = similarity_threshold
        self.cited: Citations | None = None
        modules = attention_layers(model)
        missing = memories.banks.keys() - modules.keys()
        if missing:
            raise ValueError(
                f"memories are of layers {sorted(memories.banks)}, the model has {list(modules)}"
            )
        if any(STATE in m.__dict__ for m in modules.values()):
            raise ValueError("model has memories already: detach them first")
        for layer, bank in memories.banks.items():
            _check_bank(modules[layer], layer, bank)
        self._modules = {layer: modules[layer] for layer in memories.banks}
        self._before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        for layer, module in self._modules.items():
            module.__dict__[STATE] = Reader(memories.banks[layer], self)

    def detach(self) -> None:
        """Leave the model as it was before."""
        if self._modules:
            for module in self._modules.values():
                module.__dict__.pop(STATE, None)
            self._modules = {}
            self.model.set_attn_implementation(self._before)

    def __enter__(self) -> ExtendedMind:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.detach()

    @contextlib.contextmanager
    def citing(self, last_only: bool = True) -> Iterator[Citations]:
        """Count which memories are attended to meanwhile.

        Parameters
        ----------
        last_only : bool, default True
            Only the last query of each call counts: in ``generate`` those that give the new tokens. False:
            all queries, those of the prompt too.
        """
        before, self.cited = self.cited, Citations(self.memories, last_only)
        try:
            yield self.cited
        finally:
            self.cited = before


def _check_bank(module: Any, layer: int, bank: MemoryBank) -> None:
    """A bank of another width is refused before anything is changed."""
    width = getattr(module, "head_dim", bank.head_dim)
    heads = int(getattr(module, "num_heads", 0) or module.config.num_attention_heads)
    if bank.head_dim != width or heads % bank.num_heads:
        raise ValueError(
            f"the bank of layer {layer} has {bank.num_heads} heads of width {bank.head_dim}; the model has "
            f"{heads} of width {width}: these memories are of another model"
        )


def attach_memories(
    model: Any, memories: Memories, *, top_k: int = 10, similarity_threshold: float | None = 0.25
) -> ExtendedMind:
    """Let a model attend to memories: in each layer that has a bank, one softmax over local keys and these.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its forward, ``generate``, caches, masks and batches work as before; the memories are for all items.
    memories : Memories
        Of the same model, on its device.
    top_k : int, default 10
        Memories of each query token and head.
    similarity_threshold : float or None, default 0.25
        Memories that are not more similar (cosine) to the query are left out.

    Returns
    -------
    ExtendedMind
        ``detach()`` or the end of a ``with`` block leaves the model as it was.

    Raises
    ------
    TypeError, ValueError
        No decoder of transformers; a model that has memories already; memories of another width or number of
        heads.
    """
    if not isinstance(memories, Memories):
        raise TypeError(f"memories must be Memories, got {type(memories).__qualname__}")
    return ExtendedMind(model, memories, top_k, similarity_threshold)
