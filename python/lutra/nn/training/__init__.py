"""Training methods for compressed tables, one file each, and quantizers of vectors."""

from ._base import MethodEmbedding, MethodEmbeddingBag, TrainingMethod, regularization, step_schedules
from ._finish import finish
from ._head import MethodHead
from .autodim import AutoDimEmbedding, AutoDimEmbeddingBag
from .autosrh import AutoSrhEmbedding, AutoSrhEmbeddingBag
from .deeplight import DeepLightEmbedding, DeepLightEmbeddingBag
from .dpq import DPQEmbedding, DPQEmbeddingBag, MGQEEmbedding, MGQEEmbeddingBag
from .optembed import OptEmbedding, OptEmbeddingBag
from .pep import PEPEmbedding, PEPEmbeddingBag
from .qlae import QLAEEmbedding, QLAEEmbeddingBag
from .scalar_quantize import FSQ, LatentQuantize
from .stored import *  # noqa: F403
from .stored import __all__ as _STORED
from .vector_quantize import Quantized, ResidualVQ, VectorQuantize
from .vtrans import VTransEmbedding, VTransEmbeddingBag

__all__ = [
    "FSQ", "AutoDimEmbedding", "AutoDimEmbeddingBag", "AutoSrhEmbedding", "AutoSrhEmbeddingBag",
    "DPQEmbedding", "DPQEmbeddingBag", "DeepLightEmbedding", "DeepLightEmbeddingBag", "LatentQuantize",
    "MGQEEmbedding", "MGQEEmbeddingBag", "MethodEmbedding", "MethodEmbeddingBag", "MethodHead",
    "OptEmbedding", "OptEmbeddingBag", "PEPEmbedding", "PEPEmbeddingBag", "QLAEEmbedding", "QLAEEmbeddingBag",
    "Quantized", "ResidualVQ", "TrainingMethod", "VTransEmbedding", "VTransEmbeddingBag", "VectorQuantize",
    "finish", "regularization", "step_schedules",
]  # fmt: skip
__all__ += _STORED
