"""The report: size against error for all formats, one HTML file that needs no network."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..index import _files
from ..index._progress import Progress
from . import _choose
from ._choose import Job, Option
from ._compress_file import jobs_of
from ._report import size_text
from .formats import Format

SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03, 0.015)
#: Seconds of the processors that a format may take on a table, all shares together.
LIMIT = 30.0
#: From so many values on, how long the first share takes is told by these numbers of rows beforehand.
LARGE = 1 << 25
SAMPLES = (1000, 4000)
_INK = "#010203"  # the SVG's ink until it becomes currentColor

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:nth-child(2), td:nth-child(2), td:last-child { text-align: left; }
svg { width: 100%; height: auto; }
code { font-size: 90%; }
"""


def measure(
    job: Job, formats: Any = None, seed: int = 0, bar: Any = None, limit: float | None = None
) -> dict[str, list[Option]]:
    """Each format at each of `SHARES` of a table's bytes, from the smallest.

    Where a format would take longer than ``limit`` seconds (of the processors, so that what else the machine
    does changes nothing), the shares that are too much for it are left out, with a note that says so. A share
    is taken to cost what the one before it did, times the ratio of their bytes.
    """
    if limit is None:
        limit = LIMIT
    out: dict[str, list[Option]] = {}
    samples = _samples(job, seed)
    for cls in _choose.classes(formats):
        seen: set[str] = set()
        spent, last = 0.0, None
        for share in reversed(SHARES):
            for format in _choose.fits(job, [cls], int(share * job.dense)):
                if format.describe() in seen:
                    continue
                seen.add(format.describe())
                nbytes = format.nbytes(job.shape, job.dtype) + job.extra
                if last is not None:
                    would = last.cpu * max(1.0, nbytes / max(1, last.nbytes))
                else:
                    would = _would_take(job, samples, format, share, seed)
                if spent + would > limit:
                    option = Option(format, nbytes, cpu=would, note=f"left out: about {would:.0f} s")
                else:
                    option = _choose.attempt(job, format, seed)
                    option.data = {}  # only its figures are drawn
                    spent += option.cpu
                last = option
                out.setdefault(cls.name, []).append(option)
            if bar is not None:
                bar.tick()
    return out


def _samples(job: Job, seed: int) -> list[Job]:
    """Some rows of a large table, fewer and more."""
    out: list[Job] = []
    if job.table.size < LARGE or len(job.table) <= 4 * SAMPLES[1]:
        return out
    for rows in SAMPLES:
        some = np.sort(np.random.default_rng(seed).choice(len(job.table), rows, replace=False))
        counts = None if job.counts is None else job.counts[some]
        out.append(Job(job.name, np.ascontiguousarray(job.table[some]), counts, job.dtype))
    return out


def _would_take(job: Job, samples: list[Job], format: Format, share: float, seed: int) -> float:
    """Seconds, about, for a large table at a share; 0 for others, which are tried anyway."""
    took = []
    for sample in samples:
        # some formats are made for one number of rows: then what fits the sample at the same share
        for some in (format, type(format).fit(sample.shape, int(share * sample.dense), sample.dtype)):
            tried = None if some is None else _choose.attempt(sample, some, seed)
            if tried is not None and not tried.note:
                took.append((len(sample.table), tried.cpu))
                break
    if len(took) < 2:
        return 0.0
    (few, short), (many, long) = took  # a fixed cost, and one for each row
    return long + max(0.0, long - short) / (many - few) * (len(job.table) - many)


def write(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tensors: Iterable[str] | None = None,
    formats: Any = None,
    min_rows: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
    limit: float | None = None,
    head: str = "auto",
) -> list[Option]:
    """Measure all formats on the tables of a checkpoint and write the page, whole or not at all.

    ``limit`` is the time that a format may take on a table, in seconds of the processors, default `LIMIT`;
    what would take longer is left out, and the page says what and how to have it. Returns what was left out.
    """
    _pyplot()  # before the work, not after it
    if os.path.exists(output) and os.path.samefile(path, output):
        raise ValueError(f"the report {os.fsdecode(output)!r} is the input; give another name")
    _, jobs = jobs_of(path, None if tensors is None else list(tensors), min_rows, head)
    kinds = _choose.classes(formats)
    with Progress(len(jobs) * len(kinds) * len(SHARES), "formats", progress) as bar:
        results = [(job, measure(job, formats, seed, bar, limit)) for job in jobs]
    made = page(os.path.basename(os.fsdecode(path)), results, LIMIT if limit is None else limit)
    _files.write_bytes(output, [made.encode()])
    return [o for _, by_name in results for each in by_name.values() for o in each if left_out(o)]


def left_out(option: Option) -> bool:
    return option.note.startswith("left out")


def missing(options: list[Option], limit: float) -> str:
    """What was left out, in a sentence, and how it is had; '' where nothing was."""
    if not options:
        return ""
    counts: dict[str, int] = {}
    for option in options:
        assert option.format is not None
        counts[option.format.name] = counts.get(option.format.name, 0) + 1
    names = ", ".join(f"{name} ({n})" for name, n in counts.items())
    return (
        f"{len(options)} entries were left out, since their format would have taken more than {limit:g} "
        f"seconds of the processors for all sizes of a table: {names}. --limit SECONDS gives it more; with "
        f"--formats {','.join(counts)} --limit 100000 the page has these formats alone, and all of them."
    )


def page(title: str, results: list[tuple[Job, dict[str, list[Option]]]], limit: float = LIMIT) -> str:
    """The HTML of measurements."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for job, by_name in results:
        rows, dim = job.shape
        body.append(f"<h2><code>{html.escape(job.name)}</code></h2>")
        body.append(f"<p>{rows} x {dim}, {job.dtype}, {size_text(job.dense)}</p>")
        body.append(plot(job, by_name))
        lacks = missing([o for each in by_name.values() for o in each if left_out(o)], limit)
        if lacks:
            body.append(f"<p><strong>{html.escape(lacks)}</strong></p>")
        body.append(_table(job, by_name))
    body.append(
        "<p>Error: the square root of sum |x - x'|² / sum |x|² over the rows. "
        "Bytes: all that stands for a table. Written by <code>lutra compress --report</code>.</p>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}: size against error</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _table(job: Job, by_name: dict[str, list[Option]]) -> str:
    options = sorted((o for each in by_name.values() for o in each), key=lambda o: (-o.nbytes, o.error))
    lines = []
    for o in options:
        name = html.escape(o.format.describe() if o.format is not None else "dense")
        lines.append(
            f"<tr><td>{o.nbytes / job.dense:.2%}</td><td><code>{name}</code></td>"
            + f"<td>{size_text(o.nbytes)}</td>"
            + (f"<td>{o.error:.4f}</td><td>{o.cosine:.4f}</td>" if not o.note else "<td>-</td><td>-</td>")
            + f"<td>{o.cpu:.2f}</td><td>{html.escape(o.note)}</td></tr>"
        )
    head = "".join(
        f"<th>{c}</th>" for c in ("share", "format", "bytes", "error", "cosine", "CPU seconds", "")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _pyplot() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a report needs matplotlib: pip install matplotlib") from None
    return Figure


def plot(job: Job, by_name: dict[str, list[Option]]) -> str:
    """An inline SVG whose ink is the page's."""
    import matplotlib

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "lutra", "font.family": "sans-serif"}
    ):
        figure = _pyplot()(figsize=(9, 5.5))
        axes = figure.add_subplot()
        colours: Any = matplotlib.colormaps["tab20"]
        marks = "os^Dv<>pPX*h"
        for i, (name, options) in enumerate(sorted(by_name.items())):
            good = sorted((o for o in options if not o.note), key=lambda o: o.nbytes)
            if good:
                x = [100 * o.nbytes / job.dense for o in good]
                axes.plot(
                    x, [o.error for o in good], marker=marks[i % len(marks)], color=colours(i % 20),
                    label=name, linewidth=1.2, markersize=5,
                )  # fmt: skip
        axes.set_xscale("log")
        ticks = [100 * s for s in SHARES]
        axes.set_xticks(ticks, [f"{t:g} %" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("bytes, of the dense table", color=_INK)
        axes.set_ylabel("relative error", color=_INK)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, color="#808080")
        axes.tick_params(colors=_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)
        axes.patch.set_alpha(0)
        if axes.lines:
            legend = axes.legend(
                loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, labelcolor=_INK
            )
            legend.set_title(None)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    name = html.escape(f"size against error of {job.name}")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
