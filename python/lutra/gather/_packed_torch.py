"""Packed rows in torch's own ops: on devices without a kernel, and what benchmarks compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..reference import packed as reference

_FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def decode(packed: Any, dim: int, kind: str, group: int | None, dtype: Any = torch.float32) -> Any:
    """All rows of ``packed`` as (rows, dim) of ``dtype``; computed in float32 at least."""
    k, at = reference.KINDS[kind], reference.layout(dim, kind, group)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = packed[:, : at.code_bytes]
    if k.bits < 8:
        shifts = torch.arange(0, 8, k.bits, dtype=torch.uint8, device=packed.device)
        codes = ((codes.unsqueeze(-1) >> shifts) & (2**k.bits - 1)).flatten(1)[:, :dim]
    if kind in _FLOAT8:
        values = codes.contiguous().view(_FLOAT8[kind]).to(wide)
    elif k.levels is not None:
        values = torch.from_numpy(k.levels).to(device=packed.device, dtype=wide)[codes.long()]
    else:
        values = codes.to(wide)
    stored = torch.float16 if k.scale is np.float16 else torch.float32
    tail = packed[:, at.code_bytes :].contiguous().view(stored).to(wide)
    tail = tail.reshape(packed.shape[0], at.groups, 1 + k.minimum)
    if at.groups > 1:
        tail = tail.repeat_interleave(at.group, dim=1)[:, :dim]
    values = values * tail[..., 0]
    if k.minimum:
        values = values + tail[..., 1]
    return values.to(dtype)
