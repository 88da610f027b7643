"""Running a model on calibration data: how often each row is looked up, and how the predictions change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

_LENGTH, _BATCH = 128, 8
_LIMIT = 1 << 25  # logits that are kept for comparison


def batches(calibration: Any) -> list[Any]:
    """Calibration data as a list of what the model is called with.

    Token ids (an array or tensor of one or two dimensions, or a list of sequences) become batches of ids;
    tuples and dicts are arguments as they are.
    """
    if isinstance(calibration, (torch.Tensor, np.ndarray)):
        return list(_of_array(_tensor(calibration)))
    if isinstance(calibration, (dict, tuple)):
        return [calibration]
    try:
        items = list(calibration)
    except TypeError:
        raise TypeError(
            f"calibration must be token ids or a list of batches, got {type(calibration).__qualname__}"
        ) from None
    if not items:
        raise ValueError("calibration is empty")
    if isinstance(items[0], (int, np.integer)):
        return list(_of_array(_tensor(np.asarray(items))))
    out: list[Any] = []
    for item in items:
        if isinstance(item, (dict, tuple)):
            out.append(item)
        else:
            out.extend(_of_array(_tensor(np.asarray(item) if isinstance(item, list) else item)))
    return out


def _tensor(a: Any) -> torch.Tensor:
    t = a if isinstance(a, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(a))
    if t.is_floating_point() or t.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"calibration must hold token ids (integers), got dtype {t.dtype}")
    if t.dim() not in (1, 2):
        raise ValueError(f"calibration has shape {tuple(t.shape)}; token ids have one or two dimensions")
    if not t.numel():
        raise ValueError("calibration is empty")
    return t.long()


def _of_array(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    if ids.dim() == 1:
        whole = len(ids) // _LENGTH * _LENGTH
        if whole:
            yield from ids[:whole].reshape(-1, _LENGTH).split(_BATCH)
        if len(ids) > whole:
            yield ids[whole:].unsqueeze(0)
    else:
        yield from ids.split(_BATCH)


def check_ids(data: list[Any], rows: int) -> None:
    """Token ids must be rows of the main table."""
    for batch in data:
        if isinstance(batch, torch.Tensor):
            low, high = int(batch.min()), int(batch.max())
            if low < 0 or high >= rows:
                raise IndexError(
                    f"calibration holds the id {low if low < 0 else high}; ids must be in [0, {rows})"
                )


def call(model: Any, batch: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, dict):
        return model(**{k: _to(v, device) for k, v in batch.items()})
    if isinstance(batch, tuple):
        return model(*(_to(v, device) for v in batch))
    ids = batch.to(device)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model(input_ids=ids, decoder_input_ids=ids)
    return model(ids)


def _to(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def logits_of(output: Any) -> torch.Tensor | None:
    """The logits in what a model returned."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    if found is None:
        found = output
    return found if isinstance(found, torch.Tensor) and found.dim() >= 2 else None


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's mode comes back."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def observe(
    model: Any, modules: dict[str, Any], data: list[Any], want_logits: bool
) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """Counts of the ids that each embedding is called with, and log probabilities of the predictions.

    ``modules`` are embeddings by name; several may be of one table.
    """
    counts = {name: np.zeros(len(m.weight)) for name, m in modules.items()}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            ids = args[0] if args else kwargs.get("input")
            if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
                flat = ids.detach().reshape(-1).cpu().numpy()
                flat = flat[(flat >= 0) & (flat < len(counts[name]))]
                counts[name] += np.bincount(flat, minlength=len(counts[name]))

        return hook

    seen: set[int] = set()
    logs: list[torch.Tensor] = []
    kept = 0
    try:
        for name, module in modules.items():
            if id(module) not in seen:
                seen.add(id(module))
                handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
        with evaluating(model):
            for batch in data:
                output = call(model, batch)
                if want_logits and kept < _LIMIT:
                    logits = logits_of(output)
                    if logits is not None:
                        logs.append(log_probabilities(logits, kept))
                        kept += logs[-1].numel()
    finally:
        for handle in handles:
            handle.remove()
    return counts, logs


def log_probabilities(logits: torch.Tensor, kept: int) -> torch.Tensor:
    """The first predictions, (tokens, vocabulary), as log probabilities on the CPU."""
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat[: max(1, (_LIMIT - kept) // flat.shape[1])]
    return torch.log_softmax(flat.float(), -1).cpu()


def divergence(model: Any, data: list[Any], before: list[torch.Tensor]) -> float:
    """Mean Kullback-Leibler divergence (nats) of the predictions from those before."""
    total, tokens, kept = 0.0, 0, 0
    with evaluating(model):
        for batch, p in zip(data, before):
            logits = logits_of(call(model, batch))
            assert logits is not None
            q = log_probabilities(logits, kept)[: len(p)]
            kept += p.numel()
            total += float((p.exp() * (p - q)).sum())
            tokens += len(p)
    return total / max(1, tokens)
