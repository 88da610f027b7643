"""load: a quantizer from its file; build: one from the parts that an index's file holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..index._files import File
from ._trained import Trained
from .base import Quantizer
from .opq import OPQ
from .pq import PQ
from .rabitq import RaBitQ
from .residual import ResidualQuantizer
from .rotated import RotatedSQ
from .rq import RQ
from .sq import SQ

KINDS: dict[str, type[Quantizer]] = {kind.__name__: kind for kind in (PQ, OPQ, RQ, SQ, RaBitQ, RotatedSQ)}
#: Those that are no part of an index of single vectors.
_OTHERS: dict[str, type[Trained]] = {"ResidualQuantizer": ResidualQuantizer}
_PREFIX = "quantizer "


def build(kind: Any, config: Any) -> Quantizer:
    """An untrained quantizer of a kind ('PQ', ...) and the arguments that its ``_config`` gave.

    A ValueError where they come from a file that is wrong.
    """
    return _build(KINDS, kind, config)


def _build(kinds: Mapping[str, Callable[..., Any]], kind: Any, config: Any) -> Any:
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"a quantizer of kind {kind!r}; this lutra knows {', '.join(kinds)}")
    if not isinstance(config, dict):
        raise ValueError(f"the arguments of a quantizer must be a JSON object, got {config!r}")
    try:
        return kinds[kind](**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata do not describe a {kind}: {error}") from error


def load(path: str | os.PathLike[str]) -> Any:
    """Load a quantizer that was saved with ``quantizer.save(path)``.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    Quantizer or ResidualQuantizer
        Of the kind that was saved.

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        The file is truncated, of another format or of a newer version, or does not fit together; the message
        names the path and what is wrong. Nothing in a file is ever executed.
    """
    path = os.fsdecode(path)
    with open(path, "rb") as opened:
        file = File(path, opened)
        if not file.kind.startswith(_PREFIX):
            file.fail(f"an index of kind {file.kind!r}, not a quantizer: lutra.index.load reads it")
        config = dict(file.config)
        trained = config.pop("trained", None)
        if type(trained) is not bool:
            file.fail("no 'trained' in the metadata")
        try:
            quantizer = _build({**KINDS, **_OTHERS}, file.kind[len(_PREFIX) :], config)
            if trained:
                layout = quantizer._layout()
                quantizer._restore({k: file.tensor(k, *v, mmap=False)[0] for k, v in layout.items()})
        except ValueError as error:
            if str(error).startswith(file.path):
                raise
            file.fail(str(error), error)
        file.finish()
    return quantizer
