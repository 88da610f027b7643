"""convert: the embeddings of a whole model as compressed tables, all of them or none."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from ..nn._compressed import Compressed
from . import _calibrate, _choose, _layers
from ._attach import attach
from ._choose import Job, Option
from ._find import Group, Modules, find, head_of, input_weight, select, untied_head
from ._planning import encode_all, entry_of, kinds_of, not_tried, within
from ._report import Entry, Report
from ._swap import Place, changes, is_transformers, put
from ._table import check_counts
from .formats import Format


def convert(
    model: Any,
    format: str | Format | dict[str, Any] | None = None,
    *,
    budget: float | int | str | None = None,
    calibration: Any = None,
    counts: Any = None,
    modules: Modules = None,
    formats: Any = None,
    head: str = "auto",
    min_rows: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
    inplace: bool = True,
    **parameters: Any,
) -> Any:
    """Replace the embeddings of a torch model, and its output heads, by compressed ones.

    Every chosen ``nn.Embedding`` and ``nn.EmbeddingBag`` becomes the layer of `lutra.nn` that stores its
    table in a format; an ``nn.Linear`` on the same Parameter becomes `lutra.nn.TiedHead`, other embeddings
    on it share the layer. An untied output head is converted where ``head`` or ``modules`` asks for it.
    Names, dtype, device, training mode, requires_grad and hooks stay. Models of Hugging Face transformers go
    on working with generate, tie_weights, resize_token_embeddings, save_pretrained and from_pretrained (see
    docs/convert.md). Either all is converted or, after any error, the model is as it was.

    Parameters
    ----------
    model : torch.nn.Module
    format : str, Format or dict, optional
        A format ('pq', 'pq:m=48'), or one per embedding, by its name. With ``budget``: the only one to be
        tried.
    budget : float, int or str, optional
        The chooser tries all formats and takes the best under this: a share of the bytes of the chosen tables
        ('8%' or 0.08), or bytes (an int or '12MB'). All that stands for a table counts: codes, codebooks,
        remaps, padding rows.
    calibration : token ids or batches, optional
        Ids of one or two dimensions, a list of sequences, or a list of batches (tuples or dicts of
        arguments). The model is run on them: rows weigh as often as they are looked up, and where the model
        has an output head the formats are compared by the change of its predictions.
    counts : array of shape (rows,), or dict of name to array, optional
        How often each row is used, in the place of what calibration counts.
    modules : str, list of str or callable, optional
        The embeddings to convert, by name, or a predicate of (name, module). A name may be that of an
        untied output layer, an ``nn.Linear``. Default: the input embeddings
        of a Hugging Face model, and all others of at least ``min_rows`` rows whose names do not say that
        they hold positions, segments or the like.
    formats : list of str, optional
        Names of the formats that a budget tries; default all but 'dhe', whose encoding trains a network.
    head : {'auto', 'compressed', 'dense'}, default 'auto'
        'auto': heads tied to a converted table become `TiedHead`, untied ones stay as they are.
        'compressed': the untied output head of a Hugging Face model becomes `OutputHead` as well, a table by
        its name beside the others. 'dense': tied heads keep the dense table, untied from now on.
    min_rows : int, default 1000
    seed : int, default 0
    progress : bool, optional
        A progress bar and, with a budget, the table of what was tried; default: on a terminal.
    inplace : bool, default True
        False converts a deep copy.
    **parameters
        Of the format.

    Returns
    -------
    torch.nn.Module
        The model itself, or the copy. `lutra.compress.report` of it says what was done.

    Raises
    ------
    ValueError
        Neither format nor budget; no embedding to convert; a budget that no format can meet (the message
        says the smallest); NaN or infinity in a table (module and row are named); a shared Parameter that
        cannot be kept shared.
    TypeError
        What is no model, an embedding of a class that cannot work on a compressed table.
    IndexError
        Calibration ids outside the vocabulary.

    Notes
    -----
    Optimizers made before hold the old Parameters: build them anew.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    if format is None and budget is None:
        raise ValueError("give a format or a budget")
    if head not in ("auto", "compressed", "dense"):
        raise ValueError(f"head must be 'auto', 'compressed' or 'dense', got {head!r}")
    if not inplace:
        model = copy.deepcopy(model)
    work = _Work(model, find(model), modules, min_rows, head)
    data = [] if calibration is None else _calibrate.batches(calibration)
    jobs = work.jobs(counts)
    work.calibrate(data, jobs, counts is not None, budget is not None)
    if budget is None:
        options = encode_all(jobs, format, parameters, seed, progress)
        limit = None
    else:
        limit = _choose.parse_budget(budget, sum(job.dense for job in jobs))
        kinds = kinds_of(format, formats, parameters)
        trial = (lambda options: work.trial(options, data)) if work.before else None
        options, tried = within(jobs, kinds, limit, seed, progress, trial)
        work.unfit = not_tried(kinds, tried)
        work.tried = [entry_of(j, o, o is best) for j, each, best in zip(jobs, tried, options) for o in each]
    work.replace(options)
    if work.before and budget is None:
        score = _calibrate.divergence(model, data, work.before)
        for option in options:
            option.divergence = score
    made = work.report(jobs, options, limit)
    if made.tried and (progress or (progress is None and _terminal())):
        made.show()
    model._lutra_report = made
    return model


def report(model: Any) -> Report:
    """What `convert` did to a model: prints as a table.

    Raises
    ------
    ValueError
        The model was not converted in this process.
    """
    made = getattr(model, "_lutra_report", None)
    if made is None:
        raise ValueError("this model was not converted by lutra.compress.convert in this process")
    return made


def _terminal() -> bool:
    import sys

    return sys.stdout.isatty()


class _Work:
    """The state of one conversion: what is found, what is built, and the swap."""

    def __init__(self, model: Any, groups: list[Group], modules: Modules, min_rows: int, head: str) -> None:
        self.model, self.head = model, head
        self.groups = select(model, groups, modules, min_rows)
        own = untied_head(model)
        if own is not None and not any(own.weight is g.weight for g in self.groups):
            if head == "compressed":
                self.groups.append(own)
                own = None
        else:
            own = None
        self.tried: list[Entry] = []
        self.unfit: list[str] = []
        self.before: list[torch.Tensor] = []
        self.skipped = {
            g.name: f"{g.shape[0]} x {g.shape[1]}, not asked for"
            for g in groups
            if not any(g is c for c in self.groups)
        }
        if own is not None:
            self.skipped[own.name] = (
                f"{own.shape[0]} x {own.shape[1]}, an untied output head: head='compressed' converts it"
            )
        for group in list(self.groups):
            try:
                _check(group)
            except TypeError as error:
                if modules is not None or len(self.groups) == 1:
                    raise
                self.groups.remove(group)  # not asked for by name: left alone
                self.skipped[group.name] = str(error)

    def jobs(self, counts: Any) -> list[Job]:
        """The tables as float32, with counts."""
        if counts is not None and not isinstance(counts, dict):
            if len(self.groups) > 1:
                raise ValueError(f"counts must be a dict by module: there are {len(self.groups)} tables")
            counts = {self.groups[0].name: counts}
        unknown = set(counts or {}) - {n for g in self.groups for n in g.names}
        if unknown:
            raise ValueError(f"counts names {sorted(unknown)[0]!r}, which is not among the tables to convert")
        out = []
        for group in self.groups:
            table = group.weight.detach().float().cpu().numpy()
            bad = ~np.isfinite(table).all(1)
            if bad.any():
                raise ValueError(f"{group.name}: row {int(bad.argmax())} of its table holds NaN or infinity")
            given = next((counts[n] for n in group.names if n in (counts or {})), None)
            pad = isinstance(group.module, torch.nn.Embedding) and group.module.padding_idx is not None
            dtype = str(group.weight.dtype).removeprefix("torch.")
            extra = group.shape[1] * group.weight.element_size() if pad else 0
            weights = None if given is None else check_counts(given, len(table))
            uses = 1.0 if weights is None else float(weights.sum())
            out.append(Job(group.name, table, weights, dtype, extra, uses))
        return out

    def calibrate(self, data: list[Any], jobs: list[Job], counted: bool, compare: bool) -> None:
        """Run the dense model: counts for the tables, predictions to compare with."""
        if not data:
            return
        main = input_weight(self.model)
        first = next((g for g in self.groups if g.weight is main), self.groups[0])
        if main is not None or len(self.groups) == 1:
            _calibrate.check_ids(data, first.shape[0])
        watched = {name: m for g in self.groups for name, m in g.embeddings.items()}
        want = head_of(self.model, self.groups) is not None
        seen, self.before = _calibrate.observe(self.model, watched, data, want)
        if counted:
            return
        for group, job in zip(self.groups, jobs):
            if not group.embeddings:  # a head: all its rows, for each token
                job.uses = max((float(np.sum(s)) for s in seen.values()), default=1.0)
                continue
            total = sum(seen[name] for name in group.embeddings)
            job.uses = float(np.sum(total))
            if job.uses:
                job.counts = np.asarray(total, np.float64)

    # ---------------------------------------------------------------- building and swapping
    def changes(self, options: list[Option]) -> list[Place]:
        """What to set where."""
        places = []
        for group, option in zip(self.groups, options):
            if option.format is not None:
                layer = _layers.build(group.module, option.format, option.data, group.name)
                places += changes(self.model, group, layer, self.head)
        return places

    def trial(self, options: list[Option], data: list[Any]) -> float | None:
        """The change of the predictions with these options; the model is afterwards as it was."""
        places = self.changes(options)
        try:
            put(places)
            return _calibrate.divergence(self.model, data, self.before)
        finally:
            put(places, back=True)

    def replace(self, options: list[Option]) -> None:
        """Swap everything, or nothing."""
        places = self.changes(options)
        try:
            put(places)
            attach(self.model)
            if is_transformers(self.model) and self.head == "dense" and any(g.heads for g in self.groups):
                from . import _transformers

                _transformers.untie(self.model)
        except BaseException:
            put(places, back=True)
            raise

    def report(self, jobs: list[Job], options: list[Option], limit: int | None) -> Report:
        tables = [entry_of(job, option) for job, option in zip(jobs, options)]
        return Report(tables, self.tried, limit, self.skipped, self.unfit)


def _check(group: Group) -> None:
    """Refuse what cannot be converted, with the reason."""
    name = group.name
    if group.weight.is_meta:
        raise ValueError(f"{name} is on the meta device: it holds no table")
    if not min(group.shape):
        raise ValueError(f"{name} has an empty table, {group.shape[0]} x {group.shape[1]}")
    if group.others:
        raise ValueError(
            f"the table of {name} is also used as {', '.join(group.others)}, which is neither an "
            "embedding nor a "
            "linear layer"
        )
    for path, module in group.heads.items():
        if type(module).forward is not torch.nn.Linear.forward:
            raise TypeError(
                f"{path} is tied to {name}, but is a {type(module).__qualname__}, no plain nn.Linear"
            )
    first = group.module
    for path, module in group.embeddings.items():
        if type(module) is not type(first) or _settings(module) != _settings(first):
            raise TypeError(f"{path} shares the table of {name} with other settings")
        if isinstance(module, Compressed):
            raise TypeError(f"{path} is compressed already")


def _settings(module: Any) -> dict[str, str]:
    return {k: repr(v) for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}
