"""Attention with a memory bank against the same in torch's operations: a product with all keys, and top-k."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import lutra.nn
from layers.timing import medians

HEADS, KV_HEADS, D, LOCAL, TOP_K = 8, 2, 64, 128, 10


def composed(query, key, value, keys, values, top_k):
    """The attention in torch's operations; ``keys`` of norm 1 are not the peer's to compute."""
    unit, keys = keys
    batch, heads, tokens, d = query.shape
    kv = keys.shape[0]
    grouped = query.unflatten(1, (kv, -1)).transpose(0, 1).reshape(kv, -1, d)
    ids = (grouped @ unit.transpose(1, 2)).topk(top_k).indices  # in the order of the cosines
    at = torch.arange(kv)[:, None, None]
    dots = torch.einsum("hqkd,hqd->hqk", keys[at, ids], grouped)
    memory = dots.view(kv, batch, -1, tokens, top_k).transpose(0, 1).flatten(1, 2)
    local = (query.view(batch, kv, -1, d) @ key.transpose(2, 3)).view(batch, heads, tokens, -1)
    p = (torch.cat([memory, local], -1) * d**-0.5).softmax(-1)
    out = (p[..., top_k:].reshape(batch, kv, -1, key.shape[2]) @ value).view(batch, heads, tokens, -1)
    given = p[..., :top_k].unflatten(1, (kv, -1)).transpose(0, 1).reshape(kv, -1, top_k)
    taken = torch.einsum("hqkd,hqk->hqd", values[at, ids], given)
    return out + taken.view(kv, batch, -1, tokens, d).transpose(0, 1).flatten(1, 2)


def rows(quick: bool) -> Iterator[dict]:
    threads = torch.get_num_threads()
    sizes = (3000,) if quick else (10**4, 10**5, 10**6)
    for n in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            keys, values = torch.randn(2, KV_HEADS, n, D)
            bank = lutra.nn.MemoryBank(KV_HEADS, D, dtype=dtype)
            bank.add(keys, values)
            bank.build()
            plain = lutra.nn.MemoryBank(KV_HEADS, D, dtype=dtype)
            plain.keys, plain.values, plain.norms = bank.keys, bank.values, bank.norms
            unit = torch.nn.functional.normalize(bank.keys.float(), dim=-1).to(dtype)
            for tokens in (1, 16) if quick else (1, 16, 256):
                if tokens * n > 3e7:
                    continue  # torch's scores take more than a gigabyte
                query = torch.randn(1, HEADS, tokens, D)
                key, value = torch.randn(2, 1, KV_HEADS, LOCAL, D)
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
                others = (key, value, (unit, bank.keys), bank.values, TOP_K)

                def ours(b, query=query, key=key, value=value):
                    return lutra.nn.memory_attention(query, key, value, b, enable_gqa=True, top_k=TOP_K)

                def theirs(query=query, others=others):
                    return composed(query, *others)

                def unscreened(plain=plain, ours=ours):
                    plain._queries = 0  # no codes are made
                    return ours(plain)

                with torch.no_grad():
                    # by scores in bfloat16 torch takes other memories than the nearest here and there
                    got, single = ours(bank), dtype == torch.float32
                    assert (got - unscreened()).abs().mean() < (1e-5 if single else 1e-2)
                    assert (got - theirs()).abs().mean() < (1e-5 if single else 0.2)
                    ways = {
                        "lutra": lambda ours=ours, bank=bank: ours(bank),
                        "no codes": unscreened,
                        "torch": theirs,
                    }
                    about = {"n": n, "tokens": tokens, "dtype": str(dtype)[6:], "threads": threads}
                    yield {"what": "memory attention", **about, **medians(ways, 0.1 if quick else 1.0, 41)}


def line(row: dict) -> str:
    ours = row["lutra"]
    return (
        f"memories {row['n']:>7} {row['dtype']:8} tokens {row['tokens']:>3} threads {row['threads']}: "
        f"lutra {ours:.3f} ms; without codes {row['no codes']:.3f}; torch {row['torch']:.3f} "
        f"({row['torch'] / ours:.1f}x)"
    )
