"""A progress bar for what may take long, through tqdm where it is installed."""

from __future__ import annotations

from typing import Any


class Progress:
    """A bar of ``total`` steps (None: not known), as a context.

    ``progress`` None shows it after two seconds, on a terminal and where tqdm is installed; True shows it at
    once and needs tqdm; False never.
    """

    def __init__(self, total: int | None, what: str, progress: bool | None) -> None:
        if progress not in (None, True, False):
            raise TypeError(f"progress must be None, True or False, got {progress!r}")
        self._bar: Any = None
        if progress is False:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            if progress:
                raise ImportError(
                    "progress=True needs tqdm: pip install tqdm, or leave progress at None"
                ) from None
            return
        quiet: dict[str, Any] = {} if progress else {"delay": 2, "disable": None}
        self._bar = tqdm(total=total, desc=what, leave=bool(progress), **quiet)

    def tick(self, steps: int = 1) -> None:
        if self._bar is not None and steps:
            self._bar.update(steps)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()
