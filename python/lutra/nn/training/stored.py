"""The layers whose table is made of less than rows: see their files."""

from .adaptemb import AdaptEmbedding, AdaptEmbeddingBag
from .alpt import ALPTEmbedding, ALPTEmbeddingBag
from .cafe import CAFEEmbedding, CAFEEmbeddingBag
from .cce import CCEEmbedding, CCEEmbeddingBag
from .lpt import LPTEmbedding, LPTEmbeddingBag

__all__ = [
    "ALPTEmbedding", "ALPTEmbeddingBag", "AdaptEmbedding", "AdaptEmbeddingBag", "CAFEEmbedding",
    "CAFEEmbeddingBag", "CCEEmbedding", "CCEEmbeddingBag", "LPTEmbedding", "LPTEmbeddingBag",
]  # fmt: skip
