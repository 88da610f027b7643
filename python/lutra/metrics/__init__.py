"""Metrics of retrieval: the ids that a search found against those that are relevant.

`recall_at_k`, `precision_at_k`, `success_at_k`, `mrr`, `average_precision` and `ndcg_at_k` take the ids of
any search of lutra, (nq, k) with -1 where nothing was found, and what is relevant in any of several forms
(see `recall_at_k`); `evaluate` computes several by their names, `hits` says which of the found are relevant.
All is computed where the ids lie, on the GPU too.
"""

from ._evaluate import evaluate
from ._measures import average_precision, hits, mrr, ndcg_at_k, precision_at_k, recall_at_k, success_at_k

__all__ = [
    "average_precision", "evaluate", "hits", "mrr", "ndcg_at_k", "precision_at_k", "recall_at_k",
    "success_at_k",
]  # fmt: skip
