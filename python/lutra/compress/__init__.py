"""Compressed tables: formats, files, conversion of whole models."""

import importlib
from typing import TYPE_CHECKING

from . import _hook
from ._compress_file import compress_file, decompress_file
from ._report import Report
from ._table import Table, encode
from .formats import FORMATS, Format
from .formats import make as format

if TYPE_CHECKING:
    from ._convert import convert, report
    from ._load import load_into

_LAZY = {"convert": "_convert", "report": "_convert", "load_into": "_load"}  # these import torch


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_hook.install()  # models saved by `convert` are loaded by transformers' from_pretrained

__all__ = [
    "FORMATS", "Format", "Report", "Table", "compress_file", "convert", "decompress_file", "encode", "format",
    "load_into", "report",
]  # fmt: skip
