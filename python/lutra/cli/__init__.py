"""The command line: ``lutra info``, ``demo``, ``bench``, ``compress``, ``index`` and ``search``.

It needs what ``pip install "lutra[cli]"`` brings.
"""

from __future__ import annotations

import importlib.util
import sys

NEEDS = ("typer", "rich", "tqdm")


def main() -> None:
    """Entry point of the ``lutra`` command; says what to install where the extra is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"lutra: the command line needs {', '.join(missing)}; install with: pip install 'lutra[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(1)
    from .app import app

    app(prog_name="lutra")
