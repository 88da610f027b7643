"""Drop-in layers for torch, on lutra's kernels.

`MemoryLinear` replaces a dense layer by table look-ups; `Embedding` and `EmbeddingBag` are torch's, with
torch's signatures, parameters and state_dict. For every format of `lutra.compress` there are an Embedding and
an EmbeddingBag whose table is stored in it, such as `LowRankEmbedding`. `LexinvariantEmbedding`,
`BackpackEmbedding`, `SenseDict` and `ByteWordPooling` are other ways from tokens to vectors.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("lutra.nn needs torch: pip install 'lutra[torch]'") from error

from ._attention import KeyValueCache
from ._byte_words import ByteWordPooling
from ._compressed_layers import LAYERS
from ._embedding import Embedding
from ._embedding_bag import EmbeddingBag
from ._engram import Engram
from ._families import Family, co_activation, feature_families
from ._hashes import HadamardProjection
from ._host import HostEmbedding, HostEmbeddingBag
from ._knn_attention import KNNMemoryAttention
from ._lexinvariant import LexinvariantEmbedding
from ._lookup_ffn import LookupFFN
from ._memory_attention import MemoryWeights, memory_attention
from ._memory_bank import MemoryBank
from ._memory_former import MemoryFormerBlock, MemoryFormerLM
from ._memory_linear import MemoryLinear
from ._output_head import OutputHead
from ._peer import PEER
from ._product_keys import ProductKeyMemory, ProductKeyQueries
from ._sae import SAEOutput, SparseCodes, TopKSAE
from ._scone import SconeEmbedding
from ._senses import BackpackEmbedding, SenseDict
from ._tied_head import TiedHead
from .training import *  # noqa: F403
from .training import __all__ as _TRAINING

globals().update(LAYERS)  # an Embedding and an EmbeddingBag for every format of lutra.compress

__all__ = [
    "BackpackEmbedding", "ByteWordPooling", "Embedding", "EmbeddingBag", "HadamardProjection",
    "HostEmbedding", "HostEmbeddingBag", "KeyValueCache", "LexinvariantEmbedding", "LookupFFN",
    "MemoryFormerBlock", "MemoryFormerLM", "MemoryLinear", "OutputHead", "SconeEmbedding",
    "Engram", "SenseDict", "TiedHead", *LAYERS,
]  # fmt: skip
__all__ += _TRAINING
__all__ += ["PEER", "ProductKeyMemory", "ProductKeyQueries"]
__all__ += ["Family", "SAEOutput", "SparseCodes", "TopKSAE", "co_activation", "feature_families"]
__all__ += ["KNNMemoryAttention", "MemoryBank", "MemoryWeights", "memory_attention"]
