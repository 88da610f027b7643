"""Formats of compressed tables, one file each. Importing one registers it."""

from .base import FORMATS, Array, Format, make
from .low_rank import LowRank

__all__ = ["FORMATS", "Array", "Format", "LowRank", "make"]
