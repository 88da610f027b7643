"""Mine: what collections of embeddings say about themselves.

`csls` retrieves with hubs put in their place, `hard_negatives` finds training examples, `paraphrase_mining`
the nearest pairs, `deduplicate` what is there more than once. All take arrays or an index of `lutra.index`,
go through them in blocks, and never hold a matrix of all scores.
"""

from ._csls import csls
from ._dedup import Duplicates, deduplicate
from ._negatives import HardNegatives, hard_negatives
from ._pairs import Pairs, paraphrase_mining

__all__ = [
    "Duplicates", "HardNegatives", "Pairs", "csls", "deduplicate", "hard_negatives", "paraphrase_mining",
]  # fmt: skip
