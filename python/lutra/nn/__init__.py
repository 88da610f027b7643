"""Drop-in layers for torch, on lutra's kernels.

`MemoryLinear` replaces a dense layer by table look-ups; `Embedding` and `EmbeddingBag` are torch's, with
torch's signatures, parameters and state_dict.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("lutra.nn needs torch: pip install 'lutra[torch]'") from error

from ._embedding import Embedding
from ._embedding_bag import EmbeddingBag
from ._memory_linear import MemoryLinear

__all__ = ["Embedding", "EmbeddingBag", "MemoryLinear"]
