"""Vocabularies: rows for new tokens, tables without the tokens that nobody uses.

`transplant` gives the embeddings of one tokenizer's model to another tokenizer (FOCUS, by script, mean,
random); `prune` drops tokens and keeps the map of ids. Vocabularies are dicts from token to id, as
``tokenizer.get_vocab()`` gives them; nothing here needs a tokenizer library or a network.
"""

from ._prune import Pruned, count_tokens, map_ids, prune
from ._sparsemax import sparsemax
from ._tokens import canonical_tokens, script_of
from ._transplant import Transplant, transplant

__all__ = [
    "Pruned", "Transplant", "canonical_tokens", "count_tokens", "map_ids", "prune", "script_of", "sparsemax",
    "transplant",
]  # fmt: skip
