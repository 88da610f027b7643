"""Feed-forward layers read as key-value memories: what triggers each key, and what each value promotes.

Geva, Schuster, Berant and Levy, Transformer Feed-Forward Layers Are Key-Value Memories, 2021,
arXiv 2012.14913.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..index._progress import Progress
from ..scan import knn
from ._column_top import ColumnTop
from ._triggers import LayerTriggers, Trigger, Triggers

__all__ = ["ColumnTop", "LayerTriggers", "Trigger", "Triggers", "ffn_layers", "ffn_values", "top_triggers",
           "value_tokens"]  # fmt: skip

#: How models call the second layer of a feed-forward block: its input are the coefficients of the memories.
_NAMES = (
    "mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.wo",
    "DenseReluDense.wo", "feed_forward.w2", "ffn.w2", "fc2", "linear2",
)  # fmt: skip


def ffn_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The output layers of a model's feed-forward blocks by name, as far as their names are known ones.

    Of Llama, Mistral, Qwen, Gemma (``mlp.down_proj``), GPT-2 (``mlp.c_proj``), OPT (``fc2``), GPT-NeoX
    (``mlp.dense_4h_to_h``), T5 (``DenseReluDense.wo``), ``torch.nn.TransformerEncoderLayer`` (``linear2``)
    and others.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "weight") and any(name == n or name.endswith(f".{n}") for n in _NAMES)
    }


def _chosen(model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    if layers is None:
        found = ffn_layers(model)
        if not found:
            raise ValueError(
                f"{type(model).__qualname__} has no feed-forward layers under known names: give layers, the "
                "modules whose input (or output) are the coefficients"
            )
        return found
    names = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    found = {}
    for layer in [layers] if isinstance(layers, (str, nn.Module)) else layers:
        if isinstance(layer, nn.Module):
            if layer not in names:
                raise ValueError(f"layers holds a {type(layer).__qualname__} that is no module of model")
            found[names[layer]] = layer
        elif layer in modules:
            found[layer] = modules[layer]
        else:
            raise ValueError(f"layers holds {layer!r}, which is no module of model")
    return found


def _padded(batch: Any, device: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the model is called with, token ids (batch, length), and which of them count."""
    if isinstance(batch, Mapping):
        call = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        if "input_ids" not in call:
            raise ValueError(f"a batch of the corpus has {sorted(batch)}; it needs 'input_ids'")
        ids = call["input_ids"]
        mask = call.get("attention_mask")
    else:
        if not isinstance(batch, Tensor):
            rows = [torch.as_tensor(row) for row in batch]
            if len({len(r) for r in rows}) > 1:
                raise ValueError(
                    "the sequences of a batch differ in length: pad them, in a dict with 'input_ids' and "
                    "'attention_mask'"
                )
            batch = torch.stack(rows)
        ids, mask = batch.to(device), None
        call = {"input_ids": ids}
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"a batch of the corpus must be token ids (batch, length), got {ids.dtype} {tuple(ids.shape)}"
        )
    real = torch.ones(ids.shape, dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
    return call, ids, real


class _Watch:
    """Hooks that hand a layer's coefficients to its `ColumnTop`."""

    def __init__(self, layers: dict[str, nn.Module], of: str, top: int) -> None:
        self.top, self.kept, self.real = top, {}, None  # type: ignore[var-annotated]
        self.calls = dict.fromkeys(layers, 0)
        self.handles: list[Any] = []
        for name, module in layers.items():
            hook = self._hook(name)
            if of == "input":
                self.handles.append(module.register_forward_pre_hook(lambda m, a, hook=hook: hook(a[0])))
            else:
                self.handles.append(module.register_forward_hook(lambda m, a, out, hook=hook: hook(out)))

    def _hook(self, name: str) -> Any:
        def hook(x: Tensor) -> None:
            flat, real = x.reshape(-1, x.shape[-1]), self.real
            if real is None or len(flat) != real.numel():
                raise ValueError(
                    f"layer {name!r} sees {tuple(x.shape)}, which is not one row for each token of the batch"
                )
            if name not in self.kept:
                self.kept[name] = ColumnTop(flat.shape[1], self.top, x.device)
            try:
                self.kept[name].update(flat, real.reshape(-1))
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            self.calls[name] += 1

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def top_triggers(
    model: nn.Module,
    corpus: Iterable[Any],
    *,
    layers: Any = None,
    top: int = 25,
    context: int = 32,
    of: str = "input",
    total: int | None = None,
    progress: bool | None = None,
) -> Triggers:
    """The prefixes of a corpus that trigger each key of feed-forward layers most.

    A block ``f(x @ K.T) @ V`` is a memory: each hidden unit is a key (a row of K) with a value (a row of V),
    and the activation that multiplies the value is its coefficient. For every key this keeps the ``top``
    tokens of largest coefficient; the tokens up to and with each are the prefix that triggered it.

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(input_ids=...)``, or ``model(ids)`` where it has no such argument.
    corpus : iterable of batches
        Token ids (batch, length), or dicts with ``input_ids`` and ``attention_mask`` (padding does not
        count). Read once.
    layers : names, modules, or one of them, optional
        Default: what `ffn_layers` finds.
    top : int, default 25
        t of the paper.
    context : int, default 32
        Tokens of a prefix that are kept, the last ones.
    of : {'input', 'output'}, default 'input'
        What the coefficients are: the input of the layers (the second of a block: V, also of gated ones) or
        their output (an activation, or a first layer: then before the activation).
    total : int, optional
        Number of batches, for the progress bar; default ``len(corpus)`` where there is one.
    progress : bool, optional
        None shows it after two seconds, on a terminal and where tqdm is installed.

    Returns
    -------
    Triggers

    Raises
    ------
    TypeError, ValueError
        A model without known layers, layers that are not the model's or do not run, batches of another shape,
        NaN among coefficients. No hook is left behind.

    Notes
    -----
    Memory: ``top * (4 * context + 24)`` bytes a key, whatever the length of the corpus, besides what the
    model itself needs. Coefficients are compared as float32; of equal ones the earlier token in the corpus
    comes first. The model runs in evaluation mode and without gradients, and is left in the modes it was in.

    Examples
    --------
    >>> import torch
    >>> from lutra.models.ffn_memory import top_triggers
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.fc2 = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4)
    ...     def forward(self, ids):
    ...         return self.fc2(self.embed(ids).relu())
    >>> found = top_triggers(Model(), [torch.arange(9)[None]], top=3)
    >>> found["fc2"].scores.shape
    (4, 3)
    """
    top, context = _checks.integer("top", top, 1), _checks.integer("context", context, 1)
    _checks.choice("of", of, {"input": 0, "output": 1})
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    chosen = _chosen(model, layers)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(m, m.training) for m in model.modules()]
    found = Triggers({})
    if total is None and isinstance(corpus, Sized):
        total = len(corpus)
    watch = _Watch(chosen, of, top)
    try:
        model.eval()
        with torch.no_grad(), Progress(total, "triggers", progress) as bar:
            for batch in corpus:
                call, ids, real = _padded(batch, device)
                watch.real = real
                _run(model, call)
                silent = [name for name, n in watch.calls.items() if n != 1]
                if silent:
                    times = watch.calls[silent[0]]
                    raise ValueError(f"layer {silent[0]!r} ran {times} times in a call, not once")
                watch.calls = dict.fromkeys(watch.calls, 0)
                found.take(watch.kept, ids.cpu(), real.cpu(), context)
                bar.tick()
    finally:
        watch.remove()
        for module, mode in modes:
            module.training = mode
    if not found:
        raise ValueError("corpus holds no batches")
    return found


def _run(model: nn.Module, call: dict[str, Tensor]) -> None:
    names = inspect.signature(model.forward).parameters
    takes = any(p.kind is p.VAR_KEYWORD for p in names.values())
    if "input_ids" not in names and not takes:
        model(call["input_ids"])
        return
    model(**call, **({"use_cache": False} if "use_cache" in names else {}))


# ---------------------------------------------------------------- values
def ffn_values(layer: nn.Module) -> Tensor:
    """The values of a feed-forward block, (keys, width): of its second layer, a Linear or GPT-2's Conv1D."""
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(f"layer must have a weight matrix, got {type(layer).__qualname__}")
    return weight.detach() if type(layer).__name__ == "Conv1D" else weight.detach().t()


def value_tokens(
    values: Tensor, embedding: Any, k: int = 10, *, probabilities: bool = False
) -> tuple[Tensor, Tensor]:
    """The tokens that values promote: the largest of ``values @ embedding.T``.

    Parameters
    ----------
    values : Tensor, shape (keys, width)
        Of `ffn_values`.
    embedding : Tensor, shape (vocabulary, width), or a module with such a ``weight``
        The model's output embedding, ``model.get_output_embeddings()``.
    k : int, default 10
    probabilities : bool, default False
        Give probabilities under the softmax over the vocabulary instead of logits.

    Returns
    -------
    scores : Tensor, shape (keys, k), float32 (float64 where the embedding is)
        Largest first.
    ids : Tensor, shape (keys, k), int64
        Tokens, of equal logits the lower first.

    Notes
    -----
    On the CPU an exact scan (`lutra.scan.knn`), which writes no logits; with ``probabilities`` these are
    computed too, some keys at a time. As in section 4 of the paper, the values of all layers are read by the
    output embedding, although only the last layer's are added to what it sees.
    """
    weight = embedding.weight if isinstance(embedding, nn.Module) else embedding
    k = _checks.integer("k", k, 1)
    if values.dim() != 2 or weight.dim() != 2 or values.shape[1] != weight.shape[1]:
        raise ValueError(
            f"values has shape {tuple(values.shape)}, embedding {tuple(weight.shape)}; both must be "
            "2-d, of one width"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    values, weight = values.detach().to(wide).contiguous(), weight.detach()
    k = min(k, len(weight))
    if values.is_cpu:
        scores, ids = knn(values, weight.contiguous(), k)
    else:
        scores, ids = torch.sort(values @ weight.to(wide).T, dim=1, descending=True, stable=True)
        scores, ids = scores[:, :k], ids[:, :k]
    if probabilities:
        step = max(1, (1 << 24) // len(weight))
        total = [torch.logsumexp(part @ weight.to(wide).T, 1) for part in values.split(step)]
        scores = (scores - torch.cat(total).unsqueeze(1)).exp()
    return scores, ids
