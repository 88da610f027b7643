"""Vocabularies: rows for new tokens, tables without the tokens that nobody uses.

`transplant` gives the embeddings of one tokenizer's model to another tokenizer (FOCUS, by script, mean,
random); `prune` drops tokens and keeps the map of ids; `count_fgrams` finds the frequent n-grams of a stream
of tokens, an `FGrams`. Vocabularies are dicts from token to id, as ``tokenizer.get_vocab()`` gives them;
nothing here needs a tokenizer library or a network.
"""

from ._fgram_counts import count_fgrams
from ._fgrams import FGrams
from ._prune import Pruned, count_tokens, map_ids, prune
from ._sparsemax import sparsemax
from ._tokens import canonical_tokens, script_of
from ._transplant import Transplant, transplant

__all__ = [
    "FGrams", "Pruned", "Transplant", "canonical_tokens", "count_fgrams", "count_tokens", "map_ids",
    "prune", "script_of", "sparsemax", "transplant",
]  # fmt: skip
