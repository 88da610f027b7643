"""The module for ann-benchmarks, as ann-benchmarks calls it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lutra import _backend

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "ann_benchmarks"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("lutra_ann_benchmarks", FOLDER / "module.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def vectors(n, d=32, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((20, d))
    return (centres[rng.integers(0, 20, n)] + 0.4 * rng.standard_normal((n, d))).astype(np.float32)


def recall(found, want):
    return np.mean([len(set(a) & set(b)) for a, b in zip(found.tolist(), want.tolist())]) / want.shape[1]


@pytest.mark.parametrize("metric", ["angular", "euclidean"])
@pytest.mark.parametrize(
    "text, arguments",
    [("Flat", (1,)), ("IVF32,PQ16x4fs,RFlat", (32, 20)), ("HNSW16", (100,)), ("IVF32,RaBitQ4,RFlat", (32,))],
)
def test_a_run(module, metric, text, arguments):
    # the reference inserts into a graph a thousand times slower
    x, q = vectors(1500 if _backend.core is not None else 400), vectors(30, seed=1)
    algorithm = module.Lutra(metric, text)
    algorithm.fit(x)
    algorithm.set_query_arguments(*arguments)
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (q, x)] if metric == "angular" else (q, x)
    want = np.argsort(((unit[0][:, None] - unit[1][None]) ** 2).sum(2), 1)[:, :10]
    algorithm.batch_query(q, 10)
    batch = algorithm.get_batch_results()
    assert batch.shape == (30, 10) and recall(batch, want) > 0.95
    single = np.array([algorithm.query(v, 10) for v in q])
    np.testing.assert_array_equal(single, batch)
    assert text in str(algorithm) and algorithm.get_memory_usage() > 1
    algorithm.done()


def test_bits(module):
    bits = np.random.default_rng(0).random((200, 64)) < 0.5
    algorithm = module.Lutra("hamming", "BFlat")
    algorithm.fit(bits)
    algorithm.set_query_arguments(1)
    assert algorithm.query(bits[7], 3)[0] == 7
    with pytest.raises(ValueError, match="metric must be"):
        module.Lutra("manhattan", "Flat")


def test_every_text_of_the_configuration_is_one():
    """config.yml needs no YAML package here: the texts are its quoted words that are no '@metric'."""
    import re

    from lutra.index import factory

    config = (FOLDER / "config.yml").read_text()
    texts = [t for t in re.findall(r"'([^']+)'", config) if not t.startswith("@")]
    assert len(texts) > 8
    for text in texts:
        factory(text, 128, "hamming" if text == "BFlat" else "l2")
