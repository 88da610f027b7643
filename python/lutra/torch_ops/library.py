"""The library object and the helper that registers one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._arrays import torch_kind

LIBRARY = torch.library.Library("lutra", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op. ``implementation(kind, *args)`` is the function behind the NumPy op as well.

    Tensors reach it on the CPU and on CUDA; ``fake(*args)`` gives empty outputs of the right shape and dtype.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]

    def on_cpu(*args):
        return implementation(torch_kind(False), *args)

    def on_cuda(*args):
        return implementation(torch_kind(True), *args)

    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"lutra::{name}", fake, lib=LIBRARY)


def gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give an op its gradient."""
    torch.library.register_autograd(f"lutra::{name}", backward, setup_context=setup_context, lib=LIBRARY)
