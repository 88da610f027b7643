"""What autocast asks of layers whose kernels it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; never on 'meta', which has no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_output(out: Tensor) -> Tensor:
    """A layer's result in autocast's type where autocast is on; float64 stays."""
    device = out.device.type
    if autocasts(device) and out.dtype is not torch.float64:
        return out.to(torch.get_autocast_dtype(device))
    return out
