"""The ops as torch operators: ``torch.ops.lutra.*`` with fake kernels and gradients.

Registered with ``torch.library.Library``: define, impl and register_fake in Python cost about 2 microseconds
a call, custom_op 8. Importing this package imports torch; ``import lutra`` does not.
"""

from __future__ import annotations

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
from .library import LIBRARY, plain  # noqa: F401

ops = torch.ops.lutra
use_torch(torch, forward_ad)
