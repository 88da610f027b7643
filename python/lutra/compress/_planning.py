"""The formats of a conversion: one that was asked for, or the best under a budget. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..index._progress import Progress
from . import _choose
from ._choose import Job, Option
from ._report import Entry
from .formats import Format, make

_TRIALS = 6  # formats whose predictions are compared, the best by reconstruction


def kinds_of(format: Any, formats: Any, parameters: dict[str, Any]) -> list[type[Format]]:
    if format is None:
        if parameters:
            raise TypeError(f"parameters of a format need format=, got {sorted(parameters)[0]!r}")
        return _choose.classes(formats)
    if formats is not None:
        raise ValueError("give format or formats, not both")
    if isinstance(format, dict) or parameters:
        raise ValueError("with a budget, format must be a name: the parameters follow from the budget")
    return [type(make(format))]


def encode_all(
    jobs: list[Job], format: Any, parameters: dict[str, Any], seed: int, progress: bool | None
) -> list[Option]:
    """Each table in the format that was asked for."""
    chosen = []
    for job in jobs:
        if isinstance(format, dict) and "format" not in format:
            if job.name not in format:
                raise ValueError(f"format names no format for {job.name}; it has {sorted(format)}")
            chosen.append(make(format[job.name], **parameters))
        else:
            chosen.append(make(format, **parameters))
    options = []
    for job, one in zip(jobs, chosen):
        begin = time.perf_counter()
        try:
            arrays = one.encode(job.table, job.counts, seed, progress)
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from error
        seconds = time.perf_counter() - begin
        nbytes = one.nbytes(job.shape, job.dtype) + job.extra
        error_, cosine = _choose.score(one, arrays, job)
        options.append(Option(one, nbytes, arrays, error_, cosine, seconds))
    return options


def within(
    jobs: list[Job],
    kinds: list[type[Format]],
    budget: int,
    seed: int,
    progress: bool | None,
    trial: Callable[[list[Option]], float | None] | None = None,
) -> tuple[list[Option], list[list[Option]]]:
    """The best options under a budget, and all that were tried, best first.

    ``trial`` gives the change of a model's predictions with some options.
    """
    plans = _choose.plan(jobs, kinds, budget)
    tried: list[list[Option]] = []
    trials = _TRIALS if trial is not None and len(jobs) == 1 else 0
    with Progress(sum(map(len, plans)) + trials, "formats", progress) as bar:
        for job, formats in zip(jobs, plans):
            tried.append([])
            for format in formats:
                if format is None:
                    tried[-1].append(Option(None, job.dense, error=0.0, cosine=1.0))
                else:
                    tried[-1].append(_choose.attempt(job, format, seed))
                bar.tick()
            tried[-1].sort(key=lambda o: (bool(o.note), o.error))
        if len(jobs) > 1:
            taken = _choose.distribute(jobs, tried, budget)
        else:
            able = [o for o in tried[0] if not o.note]
            if not able:
                raise ValueError(f"{jobs[0].name}: every format failed: {tried[0][0].note}")
            for option in able[:trials]:
                assert trial is not None
                option.divergence = trial([option])
                bar.tick()
            able.sort(key=lambda o: (o.divergence is None, o.divergence or 0.0, o.error))
            tried[0] = able + [o for o in tried[0] if o.note]
            taken = [able[0]]
    if trial is not None and len(jobs) > 1:
        change = trial(taken)
        for option in taken:
            option.divergence = change
    return taken, tried


def not_tried(kinds: list[type[Format]], tried: list[list[Option]]) -> list[str]:
    """Formats that fit the budget on no table."""
    names = {o.format.name for each in tried for o in each if o.format is not None}
    return [cls.name for cls in kinds if cls.name not in names]


def entry_of(job: Job, option: Option, chosen: bool = False) -> Entry:
    name = "dense" if option.format is None else option.format.describe()
    return Entry(
        job.name, name, job.dense, option.nbytes, option.error, option.cosine, option.divergence,
        option.seconds, option.note, chosen,
    )  # fmt: skip
