"""``torch.ops.lutra.random_rows``, and the same in torch's own ops, which is what CUDA computes."""

from __future__ import annotations

import torch

from ..address import _random_rows as rows
from .library import register

_LOW = 0xFFFFFFFF


def compose(
    ids: torch.Tensor,
    sequences: torch.Tensor | None,
    dim: int,
    seed: int = 0,
    scale: float = 1.0,
    dtype: str = "float32",
    output: str = "normal",
) -> torch.Tensor:
    """Random rows on any device. int64 holds the products: they wrap modulo 2^64, whose halves are right."""
    groups = -(-dim // 64)
    key = ids.new_zeros(ids.shape, dtype=torch.int64)
    if sequences is not None:
        key = key + sequences.reshape(*sequences.shape, *(1,) * (ids.dim() - sequences.dim()))
    key, token = key.unsqueeze(-1), ids.long().unsqueeze(-1)
    block = torch.arange(groups * 16, device=ids.device)
    c = [block + token * 0, token & _LOW, key & _LOW, key >> 32 & _LOW]
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(q >> 32 & _LOW) ^ c[1] ^ k0, q & _LOW, (p >> 32 & _LOW) ^ c[3] ^ k1, p & _LOW]
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    if output == "words":
        values = [(w ^ 0x80000000) - 0x80000000 for w in c]
    else:
        values = [*_normals(c[0], c[1]), *_normals(c[2], c[3])]
    out = torch.stack(values, -2).reshape(*ids.shape, 4, groups, 16).transpose(-3, -2)
    out = out.reshape(*ids.shape, groups * 64)[..., :dim]
    if output == "words":
        return out.to(torch.int32).contiguous()
    return (out * scale).to(getattr(torch, dtype)).contiguous()


def _normals(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u = ((a >> 1).float() * 2.0**-31 + 2.0**-32).double()
    t = ((((b << 2) & _LOW) ^ 0x80000000) - 0x80000000).float() * 2.0**-31
    r, t = torch.sqrt(-2 * torch.log(u)), t.double() * (torch.pi / 4)
    c = r * torch.cos(t) * torch.where(b >= 0x80000000, -1.0, 1.0)
    s = r * torch.sin(t)
    swap = (b >> 30 & 1).bool()
    return torch.where(swap, s, c), torch.where(swap, c, s)


def _fake(ids, sequences=None, dim=1, seed=0, scale=1.0, dtype="float32", output="normal"):
    rows._result(ids, sequences, scale, dtype, output)
    of = torch.int32 if output == "words" else getattr(torch, dtype)
    return ids.new_empty((*ids.shape, dim), dtype=of)


register(
    "random_rows(Tensor ids, Tensor? sequences=None, SymInt dim=1, int seed=0, float scale=1.0, "
    'str dtype="float32", str output="normal") -> Tensor',
    rows._random_rows,
    _fake,
)
