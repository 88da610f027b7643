"""Numbers of many ranges at once."""

from __future__ import annotations

from typing import Any

import numpy as np


def ranges(begins: Any, lengths: np.ndarray) -> np.ndarray:
    """The numbers ``begins[i], ..., begins[i] + lengths[i] - 1`` of all ranges, one range after another.

    ``begins`` may be one number for all; int64.
    """
    stops = np.cumsum(lengths)
    total = int(stops[-1]) if len(stops) else 0
    return np.arange(total) + np.repeat(begins - (stops - lengths), lengths)
