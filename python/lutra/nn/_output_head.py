"""OutputHead: an output layer with a compressed table of its own."""

from __future__ import annotations

from typing import Any

from ._compressed_embedding import CompressedEmbedding
from ._tied_head import TiedHead


class OutputHead(TiedHead):
    """Logits ``hidden @ table.T + bias`` of a compressed table that no embedding shares.

    What `lutra.compress.convert` puts in the place of an untied ``nn.Linear``; all that `TiedHead` can.

    Parameters
    ----------
    table : lutra.nn.*Embedding
        A submodule, ``table``: its arrays are in the state_dict under that name.
    bias : None, True or Parameter of shape (num_embeddings,), optional

    Attributes
    ----------
    weight : Parameter of shape (out_features, 0)
        That of the table. What is assigned to it is not taken: the head stays untied.

    Examples
    --------
    >>> import lutra, torch
    >>> linear = torch.nn.Linear(64, 1000, bias=False)
    >>> head = lutra.nn.OutputHead(lutra.nn.Int8Embedding.from_pretrained(linear.weight))
    >>> head(torch.randn(2, 3, 64)).shape
    torch.Size([2, 3, 1000])
    """

    def __init__(self, table: CompressedEmbedding, bias: Any = None) -> None:
        if not isinstance(table, CompressedEmbedding):
            raise TypeError(
                f"table must be a compressed embedding of lutra.nn, got {type(table).__qualname__}; "
                "torch.nn.Linear does for a dense one"
            )
        super().__init__(table, bias)
        self.table = table

    @property
    def weight(self) -> Any:
        return self._tied[0].weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":  # the table's, always
            super().__setattr__(name, value)
