"""How the time of a search grows with the collection and with the dimension: docs/images/search_growth.svg.

``python benchmarks/search/growth.py`` (needs matplotlib; 10^7 vectors are made and coded in parts, so that
codes are all that is kept). ``--quick`` stops at 10^5.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lutra.bench import interleaved
from lutra.index import IVF, Codes, Flat
from lutra.quant import PQ

K = 10
PART = 500_000
BATCH = 64


def parts(n: int, d: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Vectors of unit norm around 10,000 centres, a part at a time."""
    rng = np.random.default_rng([seed, d])
    centres = rng.standard_normal((10_000, d), dtype=np.float32)
    for begin in range(0, n, PART):
        count = min(PART, n - begin)
        x = 0.55 * rng.standard_normal((count, d), dtype=np.float32)
        x += centres[rng.integers(0, len(centres), count)]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        yield x


def kinds(n: int, d: int) -> dict[str, object]:
    lists = int(2 ** np.round(np.log2(max(16, 2 * np.sqrt(n)))))
    return {
        "Flat, float32": Flat(d, "ip"),
        "Flat, int8": Flat(d, "ip", dtype="int8"),
        "Codes, PQ 4 bits": Codes(PQ(d, d // 4, 4), "ip"),
        "IVF, PQ 4 bits, 16 lists": IVF(d, lists, PQ(d, d // 4, 4), "ip", nprobe=16),
    }


def milliseconds(name: str, index, n: int, d: int, queries: np.ndarray) -> tuple[float, float]:
    """A query alone, and in a batch."""
    scale = 127 * np.sqrt(d) / 6 if "int8" in name else None  # int8 storage takes integers
    for i, x in enumerate(parts(n, d)):
        if i == 0:
            index.train(x[:100_000]) if not index.is_trained else None
        index.add(np.clip(np.rint(x * scale), -127, 127) if scale else x)
    one = queries[:1]
    t = interleaved({"1": lambda: index.search(one, K), "64": lambda: index.search(queries, K)}, 2.0)
    return t["1"].median * 1e3, t["64"].median * 1e3 / len(queries)


def measure(sizes: list[tuple[int, int]]) -> list[dict]:
    rows = []
    for n, d in sizes:
        queries = next(parts(BATCH, d, seed=1))
        for name, index in kinds(n, d).items():
            if "float32" in name and 4 * n * d > 4 << 30:
                continue
            one, batch = milliseconds(name, index, n, d, queries)
            rows.append({"kind": name, "n": n, "d": d, "one": one, "batch": batch, "bytes": index.nbytes / n})
            print(
                f"{name:<26} n {n:>9} d {d:>5}: {one:9.4f} ms alone, {batch:9.4f} ms in a batch of {BATCH}",
                flush=True,
            )
    return rows


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    fixed = (("n", "d", 128, "vectors (d = 128)"), ("d", "n", 100_000, "dimensions (n = 100,000)"))
    for axis, (along, other, value, label) in zip(axes, fixed):
        for i, kind in enumerate(dict.fromkeys(r["kind"] for r in rows)):
            some = sorted(
                (r for r in rows if r["kind"] == kind and r[other] == value), key=lambda r: r[along]
            )
            x = [r[along] for r in some]
            axis.plot(x, [r["one"] for r in some], "o-", color=f"C{i}", label=kind)
            axis.plot(x, [r["batch"] for r in some], "s--", color=f"C{i}", alpha=0.6)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms a query")
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend(title=f"solid: alone; dashed: batch of {BATCH}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parents[1] / "results" / "search-growth.json"
    )
    parser.add_argument("--draw-only", action="store_true", help="draw what the JSON holds")
    options = parser.parse_args()
    image = Path(__file__).parents[2] / "docs" / "images" / "search_growth.svg"
    if options.draw_only:
        return draw(json.loads(options.json.read_text()), image)
    powers = (10_000, 100_000) if options.quick else (10_000, 100_000, 1_000_000, 10_000_000)
    dims = (64, 128) if options.quick else (64, 256, 512, 768, 1024, 1536)
    rows = measure([(n, 128) for n in powers] + [(100_000, d) for d in dims if d != 128])
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, image)


if __name__ == "__main__":
    main()
