"""Classes made of two: a layer or a model of others, with a class of ours in its bases.

`convert` changes what an object does without losing what it is: a model stays an instance of its class, and
so does an embedding of a subclass. The classes made here are found again by pickle and copy through the two
they are made of.
"""

from __future__ import annotations

from typing import Any

_MADE: dict[tuple[Any, Any], Any] = {}


def mixed(first: Any, second: Any) -> Any:
    """The class of bases (first, second), under the name of the one that is not ours."""
    made = _MADE.get((first, second))
    if made is None:
        named = second if first.__module__.startswith("lutra.") else first
        body = {
            "__module__": named.__module__,
            "__qualname__": named.__qualname__,
            "__doc__": named.__doc__,
            "__reduce_ex__": _reduce,
            "_lutra_parts": (first, second),
        }
        made = _MADE[first, second] = type(named.__name__, (first, second), body)
    return made


def parts(cls: type) -> tuple[type, type] | None:
    """What `mixed` made a class of; None for other classes."""
    return cls.__dict__.get("_lutra_parts")


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has none
    return _empty, type(self)._lutra_parts, state


def _empty(first: type, second: type) -> Any:
    cls: Any = mixed(first, second)
    return cls.__new__(cls)
