"""The library object and the helpers that register one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .._arrays import torch_kind

LIBRARY = torch.library.Library("lutra", "DEF")

_no_modes = _C._len_torch_dispatch_stack
_functorch = _C._functorch.peek_interpreter_stack
_tracing = _C._get_tracing_state
_below_autograd = _C._AutoDispatchBelowAutograd
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def plain(*tensors: Any) -> bool:
    """Whether a call needs nothing of torch's dispatcher, so that the kernel may be called directly.

    True for ordinary tensors outside torch.compile, tracing, functorch, dispatch modes and forward-mode
    differentiation, none of which requires a gradient that is being recorded. The dispatcher's way to a
    Python implementation takes 1.8 microseconds here, with an autograd formula 14; this test takes 0.6.
    """
    if torch.compiler.is_compiling() or _no_modes() or _functorch() is not None or _tracing() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or (grad and t.requires_grad):
            return False
        # A meta tensor has no memory; that of a negative view holds other values.
        if not (t.is_cpu or t.is_cuda) or t.is_neg():
            return False
    return True


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op. ``implementation(kind, *args)`` is the function behind the NumPy op as well.

    Tensors reach it on the CPU and on CUDA; ``fake(*args)`` gives empty outputs of the right shape and dtype.
    An op is not differentiable until `gradient` says how: backpropagating through it raises an error.
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
    _Differentiation(name)


def gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Give an op its gradient: the two functions of ``torch.library.register_autograd``."""
    _autograd[name].backward, _autograd[name].setup_context = backward, setup_context


_autograd: dict[str, _Differentiation] = {}


class _Differentiation:
    """An op's kernel for the Autograd key.

    ``torch.library.register_autograd`` does nearly this; it cannot be used under ``torch.func.grad``, gives
    no error but a missing tangent in forward-mode differentiation, and leaves ops without a formula to a
    warning and a missing gradient.
    """

    def __init__(self, name: str) -> None:
        _autograd[name] = self
        self.name = name
        self.op = getattr(torch.ops.lutra, name).default
        self.defaults = tuple(a.default_value for a in self.op._schema.arguments)
        self.backward: Callable[..., Any] | None = None
        self.setup_context: Callable[..., Any] | None = None
        self.node = self._make_node()
        LIBRARY.impl(name, self._kernel, "Autograd", with_keyset=True)

    def _kernel(self, keyset, *args):
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            if len(args) < len(self.defaults):  # the dispatcher leaves out trailing defaults
                args = (*args, *self.defaults[len(args) :])
            if _functorch() is None:
                return self.node.apply(*args, keyset)
            with enable_single_level_autograd_function():
                return self.node.apply(*args, keyset)
        with _below_autograd():
            return self.op.redispatch(keyset & _C._after_autograd_keyset, *args)

    def _refuse_tangents(self, args):
        for a in args:
            if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
                raise NotImplementedError(
                    f"lutra::{self.name} has no forward-mode derivative (jvp, jacfwd, dual tensors); "
                    "use reverse mode: backward, torch.func.grad, vjp or jacrev"
                )

    def _make_node(self):
        def forward(ctx, *args):
            args, keyset = args[:-1], args[-1]
            with _below_autograd():
                out = self.op.redispatch(keyset & _C._after_autograd_keyset, *args)
            if self.setup_context is not None:
                with _below_autograd():
                    self.setup_context(ctx, args, out)
            return out

        def backward(ctx, *grads):
            if self.backward is None:
                of = ": second derivatives are not implemented" if "_backward" in self.name else ""
                raise NotImplementedError(f"lutra::{self.name} is not differentiable{of}")
            result = self.backward(ctx, *grads)
            return (*result, None) if isinstance(result, tuple) else (result, None)

        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"lutra_{self.name}", (_SingleLevelFunction,), functions)
