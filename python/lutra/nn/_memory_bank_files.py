"""Files of memory banks: what `MemoryBank` and the memories of a model keep, a bank under a prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compress._table import to_numpy
from ..index import _files

KIND = "memory bank"
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def bank_config(bank: Any) -> dict[str, Any]:
    """Arguments of the constructor, and the number of memories, for a file."""
    return {
        "num_heads": bank.num_heads, "head_dim": bank.head_dim, "value_dim": bank.value_dim,
        "metric": bank.metric, "index": bank.index, "dtype": NAMES[bank.dtype], "n": len(bank),
    }  # fmt: skip


def bank_tensors(bank: Any, prefix: str = "") -> list[_files.Tensor]:
    """What a file keeps of a bank, a head at a time."""

    def tensor(name: str, a: Tensor) -> _files.Tensor:
        return _files.Tensor(
            prefix + name, NAMES[a.dtype], tuple(a.shape), lambda: (to_numpy(head) for head in a)
        )

    return [tensor("keys", bank.keys), tensor("values", bank.values), tensor("norms", bank.norms)]


def bank_of(kind: Any, file: _files.File, config: Any, prefix: str, mmap: bool, device: Any) -> Any:
    """A bank out of an index file, checked."""
    from safetensors import safe_open

    try:
        n, name = config["n"], config["dtype"]
        dtype = next(d for d, known in NAMES.items() if known == name)
        bank = kind(
            config["num_heads"], config["head_dim"], config["value_dim"], metric=config["metric"],
            index=config["index"], dtype=dtype, device=device,
        )  # fmt: skip
    except (TypeError, ValueError, LookupError, StopIteration) as error:
        file.fail(f"its config is not that of a MemoryBank: {error!r}", error)
    with safe_open(file.path, "pt", device=str(device)) as opened:  # tensors on the CPU are mapped
        for which, (last, of) in {
            "keys": ((bank.head_dim,), dtype),
            "values": ((bank.value_dim,), dtype),
            "norms": ((), torch.float32),
        }.items():
            if prefix + which not in opened.keys():  # noqa: SIM118  (it is no dict)
                file.fail(f"the tensor {prefix + which!r} is missing")
            given, shape = opened.get_tensor(prefix + which), (bank.num_heads, n, *last)
            if tuple(given.shape) != shape or given.dtype != of:
                file.fail(
                    f"the tensor {prefix + which!r} is {given.dtype} {tuple(given.shape)}; by the metadata "
                    f"it must be {of} {shape}"
                )
            setattr(bank, which, given if mmap else given.clone())
    return bank
