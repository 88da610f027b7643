"""sent2vec: vectors of sentences as means of the vectors of their words and word n-grams."""

from ._model import Sent2Vec

__all__ = ["Sent2Vec"]
