"""Where the benchmarks find real data."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path | None:
    """LUTRA_DATA, or shared/data beside the checkout; None where there is none."""
    folder = Path(os.environ.get("LUTRA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if folder.is_dir() else None
