"""The ops as torch operators: ``torch.ops.lutra.*`` with fake kernels and gradients.

Registered with ``torch.library.Library``: define, impl and register_fake in Python cost about 2 microseconds
a call, custom_op 8. Importing this package imports torch; ``import lutra`` does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from .._arrays import use_torch
from . import (  # noqa: F401  (registers the ops)
    address,
    binary,
    csr,
    fast_scan,
    fde,
    gather,
    hashes,
    longest_match,
    lookups,
    maxsim,
    packed,
    packed_logits,
    pieces,
    product_keys,
    random_rows,
    row_dots,
    row_update,
    scan,
    screen,
    senses,
    train,
    xor_ngrams,
)
from .library import LIBRARY  # noqa: F401

ops = torch.ops.lutra
use_torch(torch, forward_ad)

_no_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
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
