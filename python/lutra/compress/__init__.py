"""Compressed tables: formats, files, conversion of whole models."""

from ._table import Table, encode
from .formats import FORMATS, Format
from .formats import make as format

__all__ = ["FORMATS", "Format", "Table", "encode", "format"]
