"""The embeddings of a torch model, and what shares their tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..nn._compressed import Compressed
from ..nn._shared import _Shared
from ..nn.training import TrainingMethod

#: Names of tables that are no vocabularies: left alone unless asked for.
_SMALL = re.compile(r"(^|[._])(w?pe($|[._])|pos($|[._]|ition)|token_type|segment|relative)", re.IGNORECASE)

Modules = None | str | Iterable[str] | Callable[[str, Any], bool]


@dataclass
class Group:
    """The modules on one table.

    Attributes
    ----------
    weight : Parameter
    embeddings, heads : dict of name to module
        ``nn.Embedding``s or ``nn.EmbeddingBag``s, and ``nn.Linear``s, whose weight it is. The first
        embedding is the one that will hold the table; an untied head, which has no embeddings, holds its
        own. A module that is at several places of the model has
        several names.
    others : list of str
        Other places of the Parameter, which `convert` cannot serve.
    """

    weight: Any
    embeddings: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.embeddings or self.heads)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def module(self) -> Any:
        return next(iter((self.embeddings or self.heads).values()))

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        return self.weight.nelement() * self.weight.element_size()


def find(model: Any) -> list[Group]:
    """All embeddings of a model whose tables are dense, by table."""
    groups: dict[int, Group] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for name, module in modules:
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and _dense(module):
            group = groups.setdefault(id(module.weight), Group(module.weight))
            group.embeddings[name] = module
    for name, module in modules:
        for key, parameter in module._parameters.items():
            group_ = groups.get(id(parameter))
            if parameter is None or group_ is None or name in group_.embeddings:
                continue
            if key == "weight" and isinstance(module, torch.nn.Linear):
                group_.heads[name] = module
            else:
                group_.others.append(f"{name}.{key}" if name else key)
    return list(groups.values())


def untied_head(model: Any, name: str | None = None) -> Group | None:
    """A linear layer on a dense table of its own, as a group: that of a name, or what a Hugging Face model
    names as its output embeddings. None where there is none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name is not None:
        head = modules.get(name)
    else:
        head = _ask(model, "get_output_embeddings")
    if not isinstance(head, torch.nn.Linear) or not _dense(head) or "_tied" in head.__dict__:
        return None
    if any(head.weight is group.weight for group in find(model)):
        return None
    group = Group(head.weight)
    for path, module in modules.items():
        if module is head:
            group.heads[path] = module
        else:
            group.others += [f"{path}.{k}" for k, p in module._parameters.items() if p is head.weight]
    return group if group.heads else None


def _dense(module: Any) -> bool:
    if isinstance(module, (Compressed, _Shared, TrainingMethod)):  # methods: lutra.nn.finish
        return False
    weight = module._parameters.get("weight")  # a parametrized module has a property in its place
    return weight is not None and weight.dim() == 2 and weight.is_floating_point()


def select(model: Any, groups: list[Group], modules: Modules, min_rows: int) -> list[Group]:
    """The groups that ``modules`` of `convert` asks for."""
    if modules is None:
        main = input_weight(model)
        chosen = [g for g in groups if g.weight is main or (len(g.weight) >= min_rows and not _small(g))]
        if not chosen:
            sizes = ", ".join(f"{g.name} {g.shape[0]} x {g.shape[1]}" for g in groups) or "none"
            raise ValueError(
                f"no embedding of the model has min_rows = {min_rows} rows or more (there are: {sizes}); "
                "name those to convert with modules="
            )
        return chosen
    if callable(modules):
        chosen = [g for g in groups if any(modules(n, m) for n, m in g.embeddings.items())]
        if not chosen:
            raise ValueError(f"modules chose none of the embeddings: {_names(groups)}")
        return chosen
    names = [modules] if isinstance(modules, str) else list(modules)
    by_name = {n: g for g in groups for n in g.embeddings}
    chosen = []
    for name in names:
        if name not in by_name:
            head = untied_head(model, name)
            if head is None:
                raise ValueError(
                    f"modules names {name!r}, which is no embedding or untied linear layer with a dense "
                    f"table; embeddings are: {_names(groups)}"
                )
            by_name |= dict.fromkeys(head.heads, head)
        if not any(by_name[name] is g for g in chosen):
            chosen.append(by_name[name])
    if not chosen:
        raise ValueError(f"modules is empty; there are: {_names(groups)}")
    return chosen


def _names(groups: list[Group]) -> str:
    return ", ".join(n for g in groups for n in g.embeddings) or "none"


def _small(group: Group) -> bool:
    return all(_SMALL.search(name) for name in group.embeddings)


def input_weight(model: Any) -> Any:
    """The weight of a Hugging Face model's input embeddings; None for other models."""
    return getattr(_ask(model, "get_input_embeddings"), "weight", None)


def _ask(model: Any, method: str) -> Any:
    """What a method of a Hugging Face model returns; None for other models, and where it has nothing."""
    try:
        return getattr(model, method)()
    except (NotImplementedError, AttributeError, TypeError):
        return None


def head_of(model: Any, groups: list[Group]) -> Any:
    """The module that gives the logits: a tied head, or what a Hugging Face model names; None where
    there is none.
    """
    for group in groups:
        for module in group.heads.values():
            return module
    return _ask(model, "get_output_embeddings")
