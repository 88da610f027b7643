"""Optimizers for large tables: they read and write the rows that a step touched, and nothing else.

`SGD`, `Adagrad`, `RowwiseAdagrad` and `Adam` are ``torch.optim.Optimizer``\\ s. They take sparse gradients,
ordinary dense ones, and, from layers that were attached to them, no gradient of the table at all: backward
and update are one kernel. See docs/optimizers.md.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("lutra.optim needs torch: pip install 'lutra[torch]'") from error

from ._optimizers import SGD, Adagrad, Adam, RowwiseAdagrad

__all__ = ["SGD", "Adagrad", "Adam", "RowwiseAdagrad"]
