"""How well each format keeps a real table, at six sizes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lutra import scan
from lutra.compress import FORMATS, Table, encode
from lutra.compress import format as make

SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03, 0.015)
NEIGHBOURS = 10


def about(name: str, shape: tuple[int, int], share: float) -> Any:
    """Parameters of a format for a share of float32; where it goes no lower than a larger one, for that."""
    for larger in (share, 0.16, 0.2, 0.3, 0.4):
        found = FORMATS[name].fit(shape, int(shape[0] * shape[1] * 4 * larger))
        if found is not None:
            return found
    return None


def real_table(folder: Path | None, quick: bool) -> np.ndarray:
    """MiniLM's token table, (30522, 384); the first 4,000 rows and 64 columns of it in a quick run."""
    if folder is None:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((4000, 8)) @ rng.standard_normal((8, 64))
        return (x + rng.standard_normal(x.shape)).astype(np.float32)
    x = np.load(folder / "minilm_token_table_30522x384_f16.npy").astype(np.float32)
    return np.ascontiguousarray(x[:4000, :64]) if quick else x


class Judge:
    """Scores of a decoded table against the dense one."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        self.variance = float(np.square(x - x.mean(0)).sum(dtype=np.float64))
        self.sample = np.random.default_rng(0).permutation(len(x))[:2000]
        self.near = self._neighbours(x)

    def _neighbours(self, x: np.ndarray) -> np.ndarray:
        return scan.knn(x[self.sample], x, NEIGHBOURS + 1, "cosine").ids

    def __call__(self, decoded: np.ndarray) -> dict[str, float]:
        x = self.x
        cosine = (x * decoded).sum(1) / np.maximum(
            np.linalg.norm(x, axis=1) * np.linalg.norm(decoded, axis=1), 1e-12
        )
        got = self._neighbours(np.where(np.abs(decoded).max(1, keepdims=True) > 0, decoded, 1e-6))
        shared = 0
        for own, a, b in zip(self.sample, self.near, got):
            mine, theirs = [i for i in a if i != own][:NEIGHBOURS], [i for i in b if i != own][:NEIGHBOURS]
            shared += len(set(mine) & set(theirs))
        return {
            "error": float(np.square(x - decoded).sum(dtype=np.float64)) / self.variance,
            "cosine": float(cosine.mean()),
            "overlap": shared / (NEIGHBOURS * len(self.sample)),
        }


def rows(x: np.ndarray, names: list[str] | None, shares: tuple[float, ...] = SHARES) -> Iterator[dict]:
    """One row for each format and size: bytes, error (share of the variance), cosine, overlap."""
    judge, dense = Judge(x), x.nbytes
    for name in names or sorted(FORMATS):
        done = set()
        for share in shares:
            found = FORMATS[name].fit(x.shape, int(dense * share))
            if found is None or found in done:
                continue
            done.add(found)
            began = time.perf_counter()
            table = encode(x, found, progress=False)
            seconds = time.perf_counter() - began
            assert table.nbytes <= dense * share
            yield {
                "format": name, "parameters": found.describe(), "budget": share, "bytes": table.nbytes,
                "share": table.nbytes / dense, "seconds": seconds, **judge(table.decode()),
            }  # fmt: skip


def known_points(x: np.ndarray) -> Iterator[dict[str, Any]]:
    """Sizes that are quoted with the codes alone counted, beside FAISS's quantizer and NumPy's SVD."""
    judge = Judge(x)
    d = x.shape[1]
    for text, peer in ((f"pq:m={d // 4},bits=8", faiss_pq), (f"pq:m={d // 8},bits=8", faiss_pq)):
        if "pq" not in FORMATS:
            continue
        table = encode(x, make(text), progress=False)
        yield _point(text, table, judge, table.data["codes"].nbytes)
        decoded = peer(x, make(text).m)
        if decoded is not None:
            yield {"format": f"FAISS {text}", "bytes": table.nbytes, **judge(decoded)}
    rank = d // 2
    table = encode(x, "low_rank", rank=rank)
    yield _point(f"low_rank:rank={rank}", table, judge, table.data["factor"].nbytes)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    yield {"format": f"NumPy SVD, rank {rank}", "bytes": table.nbytes, **judge(best)}


def _point(text: str, table: Table, judge: Judge, codes: int) -> dict[str, Any]:
    share = codes / judge.x.nbytes
    return {"format": text, "bytes": table.nbytes, "codes alone": share, **judge(table.decode())}


def faiss_pq(x: np.ndarray, m: int) -> np.ndarray | None:
    try:
        import faiss
    except ImportError:
        return None
    quantizer = faiss.ProductQuantizer(x.shape[1], m, 8)
    quantizer.train(x)
    return quantizer.decode(quantizer.compute_codes(x))


def line(row: dict[str, Any]) -> str:
    return (
        f"{row.get('parameters', row['format']):<44} {row['bytes'] / 1e6:>8.2f} MB "
        f"{row.get('share', row.get('codes alone', float('nan'))):>7.2%}  error {row['error']:.4f}  "
        f"cosine {row['cosine']:.4f}  neighbours {row['overlap']:.3f}  "
        + (f"{row['seconds']:.1f} s" if "seconds" in row else "")
    )


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Size against error and against overlap, a line for each format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), sharex=True)
    names = sorted({r["format"] for r in table})
    marks = "os^vDPX*<>hp"
    for i, name in enumerate(names):
        mine = sorted((r for r in table if r["format"] == name), key=lambda r: r["share"])
        colour = plt.get_cmap("tab20")(i % 20)
        style = {"marker": marks[i % len(marks)], "color": colour, "label": name, "ms": 4, "lw": 1}
        axes[0].plot([100 * r["share"] for r in mine], [r["error"] for r in mine], **style)
        axes[1].plot([100 * r["share"] for r in mine], [r["overlap"] for r in mine], **style)
    titles = ("squared error, share of the variance", "overlap of the 10 nearest neighbours")
    for axis, title in zip(axes, titles):
        axis.set_xscale("log")
        axis.set_xlabel("bytes, % of float32")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.1)
    axes[1].legend(fontsize=7, ncol=2, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
