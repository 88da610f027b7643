"""collect_memories: the keys and values of a document's tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..index._progress import Progress
from ..nn import MemoryBank
from ._memories import Memories
from ._memory_layers import STATE, Recorder, attention_layers, implementation

_POSITIONS = {"start": 0, "own": 1}


def collect_memories(
    model: Any,
    input_ids: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    layers: Any = None,
    positions: str = "start",
    metric: str = "cosine",
    index: str = "exact",
    dtype: torch.dtype | None = None,
    into: Memories | None = None,
    progress: bool | None = None,
) -> Memories:
    """Run a model over documents and keep the keys and values of every token as memories.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder that uses transformers' attention interface: Llama, GPT-2, Mistral, Qwen and others.
    input_ids : Tensor or list of int, shape (n,) or (documents, n)
        The tokens of a document of any length, or of several of one length.
    window : int, optional
        Tokens that the model reads at once; default 512, or what its positions allow.
    stride : int, optional
        Tokens that are new in a window; default half of it. Smaller ones give every token more context and
        cost more: n / stride windows.
    layers : iterable of int, optional
        Default: all.
    positions : {'start', 'own'}, default 'start'
        For rotary positions. ``'start'``: keys are kept without rotation, as if all memories stood at
        position 0 (as the authors' Llama has it); ``'own'``: as the model rotated them within their window.
        Positions that are part of the input (GPT-2) stay in either case.
    metric, index, dtype
        Of the banks, see `lutra.nn.MemoryBank`; default of dtype: the keys'.
    into : Memories, optional
        To be added to, in place of new ones (whose metric, index and dtype hold then).
    progress : bool, optional
        A bar; None shows it after two seconds, on a terminal and where tqdm is installed.

    Returns
    -------
    Memories

    Raises
    ------
    TypeError
        No model of transformers; tokens that are no integers.
    ValueError
        No decoder; a window that is beyond the model's positions; layers that there are not; keys or values
        that are not finite. ``into`` is then unchanged (but for documents of a batch that are done).

    Notes
    -----
    The model is in evaluation mode meanwhile, without gradients, and is left as it was. Memories that are
    attached take no part.
    """
    ids = torch.as_tensor(input_ids)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise TypeError(
            f"input_ids must be integers, (n,) or (documents, n), got {ids.dtype} {tuple(ids.shape)}"
        )
    _checks.choice("positions", positions, _POSITIONS)
    modules = attention_layers(model)
    most = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    window = min(512, most) if window is None else _checks.integer("window", window, 1, most)
    stride = max(1, window // 2) if stride is None else _checks.integer("stride", stride, 1, window)
    if into is not None:
        layers = into.banks if layers is None else layers
    wanted = list(modules) if layers is None else [_checks.integer("a layer", i, 0) for i in layers]
    missing = set(wanted) - modules.keys()
    if missing or not wanted:
        raise ValueError(f"layers are {sorted(wanted)}; the model has {list(modules)}")
    memories, modes = into, [(m, m.training) for m in model.modules()]
    before = {i: modules[i].__dict__.get(STATE) for i in modules}
    recorders = {i: Recorder() for i in wanted}
    hooks = []
    documents = ids[None] if ids.dim() == 1 else ids
    if not documents.numel():
        raise ValueError("input_ids holds no tokens")
    steps = len(documents) * len(list(_windows(ids.shape[-1], window, stride)))
    try:
        for i, module in modules.items():
            module.__dict__[STATE] = recorders.get(i)
        for i, recorder in recorders.items():
            hooks.append(modules[i].register_forward_pre_hook(_keep_angles(recorder), with_kwargs=True))
        model.eval()
        with torch.no_grad(), implementation(model), Progress(steps, "memories", progress) as bar:
            for document in documents:
                parts: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in wanted}
                for low, begin, end in _windows(len(document), window, stride):
                    model.base_model(input_ids=document[low:end][None].to(model.device), use_cache=False)
                    for i, recorder in recorders.items():
                        parts[i].append(_fresh(modules[i], recorder, end - begin, positions))
                    bar.tick()
                joined = {i: tuple(torch.cat(p, 1) for p in zip(*part)) for i, part in parts.items() if part}
                if memories is None:
                    memories = Memories(
                        {
                            i: MemoryBank(
                                k.shape[0], k.shape[2], v.shape[2], metric=metric, index=index,
                                device=k.device, dtype=k.dtype if dtype is None else dtype,
                            )
                            for i, (k, v) in joined.items()
                        }
                    )  # fmt: skip
                memories.add(document, joined)
    finally:
        for hook in hooks:
            hook.remove()
        for i, module in modules.items():
            module.__dict__.pop(STATE, None)
            if before[i] is not None:
                module.__dict__[STATE] = before[i]
        for module, mode in modes:
            module.training = mode
    assert memories is not None
    return memories


def _windows(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """First token that is read, first that is kept, end."""
    begin = 0
    while begin < n:
        end = min(n, window if begin == 0 else begin + stride)
        yield max(0, end - window), begin, end
        begin = end


def _keep_angles(recorder: Recorder) -> Any:
    def hook(module, args, kwargs):
        recorder.angles = kwargs.get("position_embeddings")

    return hook


def _fresh(module: Any, recorder: Recorder, count: int, positions: str) -> tuple[Tensor, Tensor]:
    """Keys and values (heads, count, width) of the last tokens of a window."""
    key, value = recorder.key, recorder.value
    if key is None or value is None:
        raise ValueError(f"{type(module).__qualname__} does not use transformers' attention interface")
    if positions == "start" and recorder.angles is not None:
        key = _unrotated(module, key, recorder.angles)
    recorder.key = recorder.value = recorder.angles = None
    return key[0, :, -count:], value[0, :, -count:]


def _unrotated(module: Any, key: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Keys before their rotation, by the model's own function with the opposite angles."""
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    problem = f"the rotary positions of {type(module).__qualname__} cannot be undone: use positions='own'"
    if apply is None:
        raise ValueError(problem)
    cos, sin = (a.double() for a in angles)
    square = cos**2 + sin**2  # the square of a factor that some models put on keys and queries
    width = cos.shape[-1]
    turned, rest = key[..., :width].double(), key[..., width:]
    plain, _ = apply(turned, turned, cos / square, -sin / square)
    again, _ = apply(plain, plain, cos, sin)
    if not torch.allclose(again, turned, rtol=1e-6, atol=1e-6 * float(turned.abs().max())):
        raise ValueError(problem)
    return torch.cat([plain.to(key.dtype), rest], -1)
