"""word_offsets: where the words of a text of bytes begin."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._arrays import is_torch

#: Kinds of words; see `word_offsets`.
STYLES = {"space": 0, "leading": 1, "spacebyte": 2}


def _classes() -> tuple[np.ndarray, np.ndarray]:
    space = np.zeros(256, bool)
    space[list(b" \t\n\v\f\r")] = True
    inside = np.zeros(256, bool)  # of letters and numbers, and bytes that continue a character of UTF-8
    for first, last in ((48, 57), (65, 90), (97, 122), (0x80, 0xBF)):
        inside[first : last + 1] = True
    return space, ~inside


_SPACE, _SPACELIKE = _classes()


def word_offsets(data: Any, style: str = "space", lengths: Any = None, max_words: int | None = None) -> Any:
    """Where the words of text begin and end.

    Parameters
    ----------
    data : bytes, or array of uint8 (or integers in [0, 256)), shape (n,) or (batch, length)
    style : {'space', 'leading', 'spacebyte'}, default 'space'
        Words are parts that cover the text:

        - ``'space'``: a word begins at a byte that is not white space after one that is; the spaces behind it
          belong to it, those that begin a text to the first;
        - ``'leading'``: the spaces before it belong to it;
        - ``'spacebyte'``: a word ends after a spacelike byte that follows one which is not; spacelike is what
          is no ASCII letter or digit and does not continue a character of UTF-8 (Slagle 2024, SpaceByte,
          arXiv 2404.14408).
    lengths : array, shape (batch,), integer, optional
        2-d only: bytes of each text; the rest is padding.
    max_words : int, optional
        2-d only: W below, whatever the data (so that nothing depends on values: for torch.compile). Words
        beyond it are left out.

    Returns
    -------
    offsets : array, int64
        1-d: (words + 1,); word w is ``data[offsets[w] : offsets[w + 1]]``. 2-d: (batch, W + 1), W the largest
        number of words in a text; texts with fewer end with empty words at their length.

    Notes
    -----
    A few passes over the bytes in NumPy's or torch's own ops; no loop over words.

    Examples
    --------
    >>> import lutra
    >>> lutra.address.word_offsets(b"to be, or")
    array([0, 3, 7, 9])
    """
    _checks.choice("style", style, STYLES)
    if isinstance(data, (bytes, bytearray, memoryview)):
        data = np.frombuffer(data, np.uint8)
    torch_in = is_torch(data)
    if not torch_in and not isinstance(data, np.ndarray):
        raise TypeError(f"data must be bytes, a NumPy array or a torch tensor, got {type(data).__qualname__}")
    if str(data.dtype).removeprefix("torch.") not in ("uint8", "int32", "int64"):
        raise TypeError(f"data has dtype {data.dtype}; it must be uint8, int32 or int64")
    _checks.ndim(data, "data", 1, 2)
    if len(data.shape) == 1:
        if lengths is not None or max_words is not None:
            raise ValueError("lengths and max_words are for 2-d data, (batch, length)")
        return _flat(data, style)
    if max_words is not None:
        max_words = _checks.integer("max_words", max_words, 0)
    return _batch(data, style, lengths, max_words)


def _begins(data: Any, style: str) -> Any:
    """Bool, the shape of data: whether a word begins at a byte."""
    if is_torch(data):
        import torch

        space = torch.from_numpy(_SPACELIKE if style == "spacebyte" else _SPACE).to(data.device)[data.long()]
        begins = torch.zeros_like(space)
        started = space.logical_not().cumsum(-1) if style == "space" else None
    else:
        space = (_SPACELIKE if style == "spacebyte" else _SPACE)[data]
        begins = np.zeros_like(space)
        started = np.logical_or.accumulate(~space, -1) if style == "space" and space.size else None
    if data.shape[-1] == 0:
        return begins
    here, before = space[..., 1:], space[..., :-1]
    if style == "space":
        begins[..., 1:] = ~here & before & (started[..., :-1] != 0)  # type: ignore[index]
    elif style == "leading":
        begins[..., 1:] = here & ~before
    else:
        begins[..., 1:2] = before[..., :1]
        begins[..., 2:] = space[..., 1:-1] & ~space[..., :-2]
    begins[..., 0] = True
    return begins


def _flat(data: Any, style: str) -> Any:
    begins, n = _begins(data, style), data.shape[0]
    if is_torch(data):
        import torch

        return torch.cat([begins.nonzero().reshape(-1), torch.tensor([n], device=data.device)])
    return np.append(np.flatnonzero(begins), n).astype(np.int64)


def _batch(data: Any, style: str, lengths: Any, max_words: int | None) -> Any:
    batch, length = data.shape
    if is_torch(data):
        import torch

        place = torch.arange(length, device=data.device)
        full = torch.full((batch,), length, device=data.device)
    else:
        place, full = np.arange(length), np.full(batch, length)
    begins = _begins(data, style)
    if lengths is None:
        lengths = full
    elif tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be ({batch},): one a text")
    else:
        _check_lengths(lengths, length)
    begins = begins & (place < lengths[:, None])
    rank = begins.cumsum(-1) - 1
    if max_words is None:
        max_words = int(rank.max()) + 1 if batch and length else 0
    # Byte ``place`` begins word ``rank``; all others go to a column that is cut off.
    trash = max_words + 1
    if is_torch(data):
        column = torch.where(begins, rank, trash).clamp(max=trash)
        out = lengths.long()[:, None].repeat(1, trash + 1)
        return out.scatter(1, column, place.expand(batch, length))[:, :trash].contiguous()
    column = np.where(begins, np.minimum(rank, trash), trash)
    out = np.repeat(lengths.astype(np.int64)[:, None], trash + 1, 1)
    np.put_along_axis(out, column, np.broadcast_to(place, (batch, length)), 1)
    return np.ascontiguousarray(out[:, :trash])


def _check_lengths(lengths: Any, length: int) -> None:
    if is_torch(lengths):
        import torch

        if torch.compiler.is_compiling() or not lengths.is_cpu:
            return
    bad = (lengths < 0) | (lengths > length)
    if bool(bad.any()):
        first = int(np.asarray(bad).argmax())
        raise ValueError(f"lengths[{first}] is {int(lengths[first])}; it must lie in [0, {length}]")
