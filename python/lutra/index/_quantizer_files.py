"""Quantizers inside of indexes: their part of the metadata and of the file."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..quant._load import build
from ..quant.base import Quantizer
from ._files import File, Tensor


def quantizer_config(quantizer: Any) -> Any:
    """A quantizer, or the name of a row type, as JSON can hold it."""
    if isinstance(quantizer, str):
        return quantizer
    return {"name": type(quantizer).__name__, **quantizer._config()}  # SQ has a "kind" of its own


def quantizer_of(config: Any) -> Any:
    """What `quantizer_config` described; a ValueError where a file is wrong."""
    if not isinstance(config, dict):
        return config
    config = dict(config)
    return build(config.pop("name", None), config)


def quantizer_tensors(quantizer: Quantizer) -> list[Tensor]:
    return [
        Tensor.of_array(f"quantizer.{name}", np.ascontiguousarray(array))
        for name, array in quantizer._tensors().items()
    ]


def restore_quantizer(file: File, quantizer: Quantizer) -> None:
    """The trained state from a file."""
    try:
        layout = quantizer._layout()
        state = {name: file.tensor(f"quantizer.{name}", *of, mmap=False)[0] for name, of in layout.items()}
        quantizer._restore(state)
    except ValueError as error:
        if str(error).startswith(file.path):
            raise
        file.fail(str(error), error)
