"""MethodHead: the output layer tied to a table in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import MethodEmbedding


class MethodHead(torch.nn.Linear):
    """Logits ``hidden @ table.T + bias``, the table being that of a training method, as its look-ups give it.

    `finish` puts a `TiedHead` on the compressed table in its place.

    Parameters
    ----------
    embedding : MethodEmbedding
    bias : bool or Parameter of shape (num_embeddings,), default False

    Notes
    -----
    Holds a reference to the embedding; ``weight`` is the embedding's, for libraries that tie or initialise
    it. Cost: all rows are transformed in each call, beside the product; the losses of the method's
    `regularization` are then those of all rows, where the head is called after the embedding.
    """

    def __init__(self, embedding: MethodEmbedding, bias: bool | torch.nn.Parameter = False) -> None:
        if not isinstance(embedding, MethodEmbedding):
            raise TypeError(
                f"embedding must be a training method of lutra.nn, got {type(embedding).__qualname__}; "
                "lutra.nn.TiedHead takes others"
            )
        torch.nn.Module.__init__(self)
        self._tied = (embedding,)  # in a tuple: no submodule of the head
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.weight = embedding.weight
        if isinstance(bias, torch.nn.Parameter):
            if tuple(bias.shape) != (self.out_features,):
                raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({self.out_features},)")
            self.bias = bias
        elif bias:
            self.bias = torch.nn.Parameter(self.weight.detach().new_zeros(self.out_features))
        else:
            self.register_parameter("bias", None)

    @property
    def embedding(self) -> MethodEmbedding:
        """The layer whose table this is."""
        return self._tied[0]

    def forward(self, input: Tensor) -> Tensor:
        """Logits (..., num_embeddings) of hidden states (..., embedding_dim)."""
        return F.linear(input, self.embedding.rows(), self.bias)
