"""A sparse autoencoder of real embeddings: what it explains, its families, and searches that it steers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from real_data import data_folder

WORDS = ("haskell", "game", "font", "chemistry")


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Lines on an autoencoder of the Debian embeddings (16,576 of 384 dimensions)."""
    import torch

    import lutra.nn

    folder = data_folder()
    if folder is None:
        return
    lines = (folder / "debian_texts.tsv").read_text().splitlines()
    texts = [line.split("\t") for line in lines]
    queries, docs = (
        torch.from_numpy(np.load(folder / f"debian_{name}_f16.npy").astype(np.float32))
        for name in ("queries", "docs")
    )
    x = torch.cat([queries, docs])
    torch.manual_seed(0)
    n, k = 3072, 24
    sae = lutra.nn.TopKSAE(384, n, k, dead_after=30_000)
    with torch.no_grad():
        sae.decoder_bias.copy_(x.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for _ in range(3 if quick else 25):
        for batch in torch.randperm(len(x)).split(1024):
            optimizer.zero_grad()
            sae.loss(x[batch]).loss.backward()
            optimizer.step()
            sae.normalize_()
    sae.eval()
    index = lutra.index.Flat(384, "ip")
    index.add(docs.numpy())

    def found(q):
        ids = index.search(q.numpy(), 10).ids
        return float((ids == np.arange(len(q))[:, None]).any(1).mean())

    with torch.no_grad():
        codes, left = sae.encode(docs), docs - sae(docs)[0]
        variance = (docs - docs.mean(0)).square().sum()
        rebuilt = torch.nn.functional.normalize(sae(queries)[0], dim=1)
    yield {
        "what": f"{n} latents, k {k}", "fvu": float(left.square().sum() / variance),
        "dead": len(sae.dead), "own text in 10": found(queries), "rebuilt": found(rebuilt),
    }  # fmt: skip

    def names(latent):
        value = ((codes.ids == latent) * codes.values).sum(1)
        return [texts[i][0] for i in value.topk(4).indices.tolist()]

    families = lutra.nn.feature_families(*codes, n, min_share=0.5, min_count=10, max_density=0.1)
    yield {"what": "families", "count": len(families), "sizes": [1 + len(f.children) for f in families]}
    for family in families[:5]:
        children = [names(c) for c in family.children[:3].tolist()]
        yield {"what": "family", "parent": names(family.parent), "children": children}
    active = torch.zeros(len(docs), n).scatter_(1, codes.ids, (codes.values > 0).float())
    some = queries[torch.randperm(len(queries))[:500]]
    for word in WORDS:
        has = torch.tensor([word in " ".join(t[1:]).lower() for t in texts])
        share = active[has].mean(0) - active[~has].mean(0)
        latent = int(share.argmax())
        hits = {}
        for value in (None, 0.5, 1.0, 1.5):
            with torch.no_grad():
                q = some if value is None else sae.steer(some, {latent: value}, normalize=True)
            ids = index.search(q.numpy(), 10).ids
            hits[value] = float(has[torch.from_numpy(ids)].float().mean())
        yield {
            "what": "steer", "word": word, "texts": int(has.sum()), "latent": latent,
            "share": float(active[has][:, latent].mean()), "hits": hits,
        }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    if row["what"] == "families":
        return f"{row['count']} families, of {row['sizes'][:12]} latents"
    if row["what"] == "family":
        inner = "; ".join(", ".join(c) for c in row["children"])
        return f"  {', '.join(row['parent'])} > {inner}"
    if row["what"] == "steer":
        hits = ", ".join(f"{'as it is' if v is None else v}: {h:.1%}" for v, h in row["hits"].items())
        return (
            f"steered to {row['word']!r} ({row['texts']} texts, {row['share']:.0%} of them use the latent): "
            f"of the first 10 have the word {hits}"
        )
    return (
        f"{row['what']}: {row['fvu']:.3f} of the variance unexplained, {row['dead']} dead; own text among "
        f"the first 10: {row['own text in 10']:.1%}, queries rebuilt {row['rebuilt']:.1%}"
    )


def expect(found: list[dict[str, Any]]) -> None:
    """A short training explains some of the variance, and steering finds more of what it steers to."""
    assert found[0]["fvu"] < 0.6 and found[0]["rebuilt"] > 0.5 * found[0]["own text in 10"]
    steered = {r["word"]: r["hits"] for r in found if r["what"] == "steer"}
    assert all(h[1.5] > h[None] for h in steered.values()), steered
