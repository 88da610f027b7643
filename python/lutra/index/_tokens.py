"""Token vectors of many documents, in the forms that encoders give them, as (tokens, ptr)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _checks
from .._arrays import F32, I8, I32, I64, U8, Kind, is_native, is_torch, kind_of, type_name
from ._home import HOST, VECTOR_CODES, Home, adopt

FORMS = (
    "a list of arrays (n_i, d), one for each document; an array (documents, length, d), with a mask where it "
    "is padded; or a tuple (tokens, ptr)"
)


def as_tokens(x: Any, d: int | None = None, mask: Any = None) -> tuple[Any, Any]:
    """Token vectors of many documents, or queries, as one array and where each of them begins.

    Parameters
    ----------
    x : list, array, tuple or dict
        - a list of arrays (n_i, d): what ``encode`` of pylate's and of sentence-transformers' multi-vector
          models returns;
        - an array (documents, length, d): all of it, or padded, with ``mask``;
        - a tuple (tokens, ptr): an array (n, d), and offsets (documents + 1,) that rise from 0 to n;
        - what they return with ``output_value=None``: a dict with 'token_embeddings' and 'masks' or
          'attention_mask', or a list of such dicts;
        - a nested tensor of torch (layout jagged).

        NumPy, torch or CuPy, all of one library, device and dtype; float32, float16, bfloat16, float64, int8
        or uint8. Arrays of other libraries are read as NumPy arrays.
    d : int, optional
        The dimension that the vectors must have.
    mask : array or list, optional
        Bools, or integers that are not 0: which tokens count. Shape (documents, length) for an array, (n,)
        for (tokens, ptr), a list of arrays (n_i,) for a list.

    Returns
    -------
    tokens : array, shape (n, d), the dtype of ``x``
    ptr : array, shape (documents + 1,), int64, of the same library and on the same device
        The tokens of document i are ``tokens[ptr[i] : ptr[i + 1]]``.

    Raises
    ------
    TypeError
        No arrays, or arrays of several libraries or dtypes.
    ValueError
        Shapes, a ``ptr`` or a mask that do not fit; an empty list where ``d`` is not given.

    Notes
    -----
    (tokens, ptr), arrays without a mask or with one that is all true, and a list of one array are not copied;
    a list, and what a mask leaves, is copied once.

    Examples
    --------
    >>> import numpy as np, lutra
    >>> documents = [np.ones((2, 4), np.float32), np.zeros((3, 4), np.float32)]
    >>> lutra.index.as_tokens(documents)[1]
    array([0, 2, 5])
    """
    return tokens_of(x, d, mask)


def tokens_of(x: Any, d: int | None, mask: Any, *, look: bool = True) -> tuple[Any, Any]:
    """`as_tokens`; without ``look`` offsets that lie on a GPU beside their tokens are as they are given."""
    if isinstance(x, Mapping):
        x, mask = _of_mapping(x, mask)
    elif isinstance(x, list) and x and all(isinstance(entry, Mapping) for entry in x):
        x, masks = (list(part) for part in zip(*(_of_mapping(entry, None) for entry in x)))
        mask = masks if mask is None and masks[0] is not None else mask
    if isinstance(x, tuple) and len(x) == 2 and not _is_matrix(x[1]):
        tokens, ptr = _ragged(*x, d, look)
    elif isinstance(x, (list, tuple)) or (isinstance(x, np.ndarray) and x.dtype == object and x.ndim == 1):
        tokens, ptr, mask = _documents(list(x), d, mask)
    elif is_torch(x) and x.is_nested:
        tokens, ptr = _nested(x, d)
    elif is_native(x) or hasattr(x, "__dlpack__"):
        return _padded(adopt(x, "x"), d, mask)
    else:
        raise TypeError(f"x must be {FORMS}; got {type_name(x)}")
    return (tokens, ptr) if mask is None else _masked(tokens, ptr, mask)


def _home(kind: Kind, like: Any) -> Home:
    """The arrays' own library and device, torch on the CPU too."""
    return HOST if kind is HOST.kind else Home(kind, kind.empty((0,), F32, like))


def _of_mapping(x: Mapping[Any, Any], mask: Any) -> tuple[Any, Any]:
    if "token_embeddings" not in x:
        raise TypeError(
            f"x is a dict without 'token_embeddings' (it has {sorted(map(str, x))}); give {FORMS}"
        )
    if mask is None:  # pylate's 'masks' leave out its list of tokens to skip, too
        mask = x.get("masks", x.get("attention_mask"))
    return x["token_embeddings"], mask


def _is_matrix(a: Any) -> bool:
    return len(getattr(a, "shape", ())) > 1


def _check(native: Any, name: str, d: int | None) -> Kind:
    """The kind of an array of vectors whose last dimension is d."""
    kind = kind_of(native, name)
    _checks.dtype(kind, native, name, VECTOR_CODES)
    if d is not None and native.shape[-1] != d:
        raise ValueError(f"{name} has vectors of {native.shape[-1]} dimensions; they must have d = {d}")
    return kind


# ---- the forms
def _ragged(tokens: Any, ptr: Any, d: int | None, look: bool = True) -> tuple[Any, Any]:
    tokens = adopt(tokens, "tokens")
    if len(tokens.shape) != 2:
        raise ValueError(f"tokens of (tokens, ptr) must be 2-d (n, d), got shape {tuple(tokens.shape)}")
    kind = _check(tokens, "tokens", d)
    same = is_native(ptr) and kind_of(ptr, "ptr") is kind and kind.code(ptr) == I64
    same = same and (not kind.cuda or ptr.device == tokens.device)
    if same and kind.cuda and not look and len(ptr.shape) == 1 and ptr.shape[0]:
        return tokens, ptr
    checked = check_ptr(ptr, int(tokens.shape[0]))
    if same:
        return tokens, ptr
    return tokens, _home(kind, tokens).bring(checked)


def check_ptr(ptr: Any, n: int, name: str = "ptr") -> np.ndarray:
    """Offsets that rise from 0 to n, as int64 on the host; a view where they are that."""
    if isinstance(ptr, (list, tuple, range)):
        try:
            ptr = np.asarray(ptr)
        except (ValueError, OverflowError) as error:
            raise TypeError(f"{name} must be integers: {error}") from None
    native = adopt(ptr, name)
    offsets = HOST.bring(native)
    if offsets.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers (int64), got dtype {offsets.dtype}")
    if offsets.ndim != 1 or not offsets.size:
        raise ValueError(f"{name} must be 1-d (documents + 1,), got shape {offsets.shape}")
    offsets = offsets.astype(np.int64, copy=False)
    if offsets[0] != 0:
        raise ValueError(f"{name} must begin with 0, it begins with {offsets[0]}")
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        i = int(falls.argmax())
        raise ValueError(f"{name} must rise; {name}[{i + 1}] is {offsets[i + 1]}, after {offsets[i]}")
    if offsets[-1] != n:
        raise ValueError(f"{name} must end with the number of tokens, {n}; it ends with {offsets[-1]}")
    return offsets


def _documents(documents: list[Any], d: int | None, mask: Any) -> tuple[Any, Any, Any]:
    if not documents:
        if d is None:
            raise ValueError("x is an empty list: there are no documents")
        return np.empty((0, d), np.float32), np.zeros(1, np.int64), None
    arrays = [adopt(a, f"x[{i}]") for i, a in enumerate(documents)]
    first = arrays[0]
    kind = kind_of(first, "x[0]")
    for i, a in enumerate(arrays):
        name = f"x[{i}]"
        if len(a.shape) != 2:
            hint = "; a list of vectors is one document: give [numpy.stack(x)]" if len(a.shape) == 1 else ""
            if len(a.shape) == 3:  # pylate with padding=True
                hint = "; encode without padding, or concatenate them and give the mask"
            raise ValueError(f"{name} must be 2-d (tokens, dimensions), got shape {tuple(a.shape)}{hint}")
        _checks.same_kind(kind, a, name, first, "x[0]")
        if a.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {a.dtype}, x[0] {first.dtype}; documents must be of one dtype")
        _check(a, name, int(first.shape[1]) if d is None else d)
    lengths = [int(a.shape[0]) for a in arrays]
    if mask is not None:
        mask = _flat_mask(kind, mask, lengths, first)
    home = _home(kind, first)
    ptr = home.bring(np.cumsum([0, *lengths], dtype=np.int64))
    if len(arrays) == 1:
        return first, ptr, mask
    return _concatenate(home, arrays), ptr, mask


def _concatenate(home: Home, arrays: list[Any]) -> Any:
    if home.kind.name == "torch":
        return home.xp.cat(arrays)
    if home.kind is HOST.kind:
        return np.concatenate(arrays)
    with home.anchor.device:
        return home.xp.concatenate(arrays)


def _flat_mask(kind: Kind, mask: Any, lengths: list[int], like: Any) -> Any:
    """Masks of the documents of a list, one after another."""
    if not isinstance(mask, (list, tuple)) or len(mask) != len(lengths):
        got = f"{len(mask)} items" if isinstance(mask, (list, tuple)) else type_name(mask)
        raise ValueError(f"mask must be a list of {len(lengths)} arrays, one for each of x; got {got}")
    home = _home(kind, like)
    parts = []
    for i, (part, n) in enumerate(zip(mask, lengths)):
        part = _mask(home, part, f"mask[{i}]")
        if tuple(part.shape) != (n,):
            raise ValueError(f"mask[{i}] has shape {tuple(part.shape)}; x[{i}] has {n} tokens")
        parts.append(part)
    return _concatenate(home, parts)


def _nested(x: Any, d: int | None) -> tuple[Any, Any]:
    import torch

    if x.layout is torch.jagged and x.is_contiguous() and x.values().dim() == 2:
        return _ragged(x.values(), x.offsets(), d)
    return _documents(list(x.unbind()), d, None)[:2]


def _padded(x: Any, d: int | None, mask: Any) -> tuple[Any, Any]:
    shape = tuple(int(size) for size in x.shape)
    if len(shape) == 2:
        raise ValueError(
            f"x is one matrix, of shape {shape}: give [x] where it is one document, (x, ptr) where several"
        )
    if len(shape) != 3:
        raise ValueError(f"x must be 3-d (documents, length, d), got shape {shape}; or give {FORMS}")
    kind = _check(x, "x", d)
    home = _home(kind, x)
    count, length, width = shape
    if mask is not None:
        mask = _mask(home, mask, "mask")
        if tuple(mask.shape) != (count, length):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; x has {shape}, so it must be {(count, length)}"
            )
        if not bool(mask.all()):
            lengths = HOST.bring(mask.sum(1))
            return x[mask], home.bring(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    ptr = home.arange(count + 1) * length
    return x.reshape(count * length, width), ptr


# ---- masks
def _mask(home: Home, mask: Any, name: str) -> Any:
    """A mask of any library as bools in a home."""
    native = adopt(np.asarray(mask) if isinstance(mask, (list, tuple)) else mask, name)
    text = str(native.dtype).removeprefix("torch.")
    if text != "bool" and kind_of(native, name).code(native) not in (I64, I32, I8, U8):
        raise TypeError(f"{name} must hold bools, or integers that are 0 or not; got dtype {text}")
    native = home.bring(native)
    return native if text == "bool" else native != 0


def _masked(tokens: Any, ptr: Any, mask: Any) -> tuple[Any, Any]:
    kind = kind_of(tokens, "tokens")
    home = _home(kind, tokens)
    mask = _mask(home, mask, "mask")
    if tuple(mask.shape) != (int(tokens.shape[0]),):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; there are {int(tokens.shape[0])} tokens")
    if bool(mask.all()):
        return tokens, ptr
    before = np.concatenate([[0], np.cumsum(HOST.bring(mask), dtype=np.int64)])
    return tokens[mask], home.bring(before[HOST.bring(ptr)])
